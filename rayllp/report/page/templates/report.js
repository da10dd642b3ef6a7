// Draws the pictures, and shows and hides runs. The page's figures, words and tables need no script.
(async () => {
  "use strict";
  for (const place of document.querySelectorAll(".plot")) {
    await Bokeh.embed.embed_item(JSON.parse(place.firstElementChild.textContent), place);
  }
  const plots = Bokeh.documents.flatMap((each) => each.roots());
  if (matchMedia("(pointer: coarse)").matches) {
    for (const plot of plots) plot.toolbar.active_drag = null; // a finger that lands on a picture scrolls the page,
    for (const place of document.querySelectorAll(".plot")) { // and one that taps it asks for its values, as a pointer over it does
      place.addEventListener("click", (event) => event.composedPath()[0].dispatchEvent(new PointerEvent("pointermove", {
        clientX: event.clientX, clientY: event.clientY, isPrimary: true, bubbles: true, view: window,
      })));
    }
  }
  addEventListener("beforeprint", () => { // paper is narrower than the screen, and Bokeh would not hear of it in time
    for (const place of document.querySelectorAll(".plot")) {
      place.style.setProperty("--shrink", Math.min(1, (place.closest(".charts") ? 330 : 680) / place.offsetWidth));
    }
  });
  const boxes = [...document.querySelectorAll("input[data-run]")];
  const update = () => {
    const shown = boxes.map((box) => box.checked);
    shown.forEach((visible, run) => document.body.classList.toggle("hide" + run, !visible));
    for (const plot of plots) {
      for (const drawn of plot.renderers) {
        const runs = drawn.data_source.get_column("run");
        if (runs) drawn.view.filter.booleans = Array.from(runs, (run) => shown[run]);
      }
      shown.forEach((visible, run) => { for (const drawn of plot.select("run" + run)) drawn.visible = visible; });
    }
  };
  for (const box of boxes) box.addEventListener("change", update);
})();
