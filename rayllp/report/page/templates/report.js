// Shows and hides runs, and the values under the pointer. Without it the page is whole.
(() => {
  "use strict";
  for (const box of document.querySelectorAll("input[data-run]")) {
    box.addEventListener("change", () => document.body.classList.toggle("hide" + box.dataset.run, !box.checked));
  }
  const names = [...document.querySelectorAll(".runs label")].map((label) => label.textContent.trim());
  const tip = document.getElementById("tip");
  const written = (value) => (value === null ? "not finite" : String(Number(value.toPrecision(5))).replace("-", "−"));
  const place = (x, scale) => {
    if (scale !== "time") return Math.round(x).toLocaleString("en");
    return x < 300 ? x.toFixed(1) + " s" : x < 10800 ? (x / 60).toFixed(1) + " min" : (x / 3600).toFixed(2) + " h";
  };
  const nearest = (xs, x, steps) => {
    let low = 0, high = xs.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (xs[middle] <= x) low = middle; else high = middle - 1;
    }
    return !steps && low + 1 < xs.length && xs[low + 1] - x < x - xs[low] ? low + 1 : low;
  };
  for (const figure of document.querySelectorAll(".chart")) {
    const area = figure.querySelector(".area");
    let data = null, cross = null;
    const leave = () => { tip.hidden = true; if (cross) cross.hidden = true; };
    const move = (event) => {
      data = data || JSON.parse(figure.querySelector("script").textContent);
      if (!cross) { cross = document.createElement("i"); cross.className = "cross"; area.append(cross); }
      const box = area.getBoundingClientRect();
      const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      const x = data.range[0] + share * (data.range[1] - data.range[0]);
      tip.replaceChildren();
      const head = document.createElement("b");
      head.textContent = data.label + " " + place(x, data.scale);
      tip.append(head);
      for (const curve of data.curves) {
        if (document.body.classList.contains("hide" + curve.run) || !curve.x.length) continue;
        const n = nearest(curve.x, x, curve.steps), line = document.createElement("div"), swatch = document.createElement("span");
        swatch.className = "swatch " + curve.colour;
        let text = (names.length ? names[curve.run] + ", " : "") + curve.name + ": " + written(curve.y[n]);
        if (curve.low && curve.low[n] !== curve.high[n]) text += " (" + written(curve.low[n]) + " to " + written(curve.high[n]) + ")";
        if (curve.x.length < 200) text += " at " + place(curve.x[n], data.scale);
        line.append(swatch, text);
        tip.append(line);
      }
      tip.hidden = cross.hidden = false;
      cross.style.left = 100 * share + "%";
      const left = Math.min(event.pageX + 14, window.scrollX + document.documentElement.clientWidth - tip.offsetWidth - 6);
      tip.style.left = Math.max(window.scrollX + 4, left) + "px";
      tip.style.top = event.pageY + 16 + "px";
    };
    area.addEventListener("pointermove", move);
    area.addEventListener("pointerdown", move);
    area.addEventListener("pointerleave", leave);
  }
})();
