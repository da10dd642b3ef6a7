// Draws the pictures, and shows and hides runs. The page's figures, words and tables need no script.
(async () => {
  "use strict";
  const places = [...document.querySelectorAll(".plot")];
  const root_ids = places.map((place) => place.id);
  const roots = Object.fromEntries(root_ids.map((id) => [id, id]));
  await Bokeh.embed.embed_items({ page: JSON.parse(document.getElementById("drawn").textContent) }, [{ docid: "page", root_ids, roots }]);
  const plots = Bokeh.documents[0].roots();
  if (matchMedia("(pointer: coarse)").matches) {
    for (const plot of plots) plot.toolbar.active_drag = null; // a finger that lands on a picture scrolls the page,
    for (const place of places) { // and one that taps it asks for its values, as a pointer over it does
      place.addEventListener("click", (event) => event.composedPath()[0].dispatchEvent(new PointerEvent("pointermove", {
        clientX: event.clientX, clientY: event.clientY, isPrimary: true, bubbles: true, view: window,
      })));
    }
  }
  addEventListener("beforeprint", () => { // paper is narrower than the screen, and Bokeh would not hear of it in time
    for (const place of places) {
      place.style.setProperty("--shrink", Math.min(1, (place.closest(".charts") ? 330 : 680) / place.offsetWidth));
    }
  });
  const boxes = [...document.querySelectorAll("input[data-run]")];
  const update = () => {
    const shown = boxes.map((box) => box.checked);
    shown.forEach((visible, run) => document.body.classList.toggle("hide" + run, !visible));
    for (const plot of plots) {
      for (const drawn of plot.renderers) {
        const runs = Array.from(drawn.data_source.get_column("run") ?? []);
        if (new Set(runs).size > 1) drawn.view.filter.booleans = runs.map((run) => shown[run]);
        else if (runs.length) drawn.visible = shown[runs[0]];
      }
    }
  };
  for (const box of boxes) box.addEventListener("change", update);
})();
