"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const fine = matchMedia("(pointer: fine)").matches;

// Colours stand in the figures by the page's names, so that they follow light and dark.
function coloured(value, style) {
  if (typeof value === "string") {
    const name = /^var\((--[a-z]+)\)$/.exec(value);
    return name ? style.getPropertyValue(name[1]).trim() : value;
  }
  if (Array.isArray(value)) return value.map((item) => coloured(item, style));
  if (value && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item, style)]));
  return value;
}

function draw() {
  const style = getComputedStyle(document.documentElement);
  for (const [name, figure] of Object.entries(figures)) {
    const place = document.getElementById("chart-" + name);
    const { data, layout } = coloured(figure, style);
    layout.dragmode = fine ? "zoom" : false; // under a finger, the page is to scroll
    Plotly.react(place, data, layout, { responsive: true, displayModeBar: false });
  }
}
draw();
dark.addEventListener("change", draw);

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const body = head.closest("table").tBodies[0];
    const column = head.cellIndex;
    const ascending = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const key = (row) => row.cells[column].dataset.value;
    body.append(...[...body.rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // what is missing stays below
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return ascending ? order : -order;
    }));
  });
}

const dialog = document.querySelector("dialog");
if (dialog) {
  const shown = [...document.querySelectorAll(".open")];
  const picture = dialog.querySelector("img");
  let at = 0;
  const show = (index) => {
    at = (index + shown.length) % shown.length;
    const image = shown[at].querySelector("img");
    picture.src = image.src;
    picture.alt = image.alt;
    dialog.querySelector("[data-caption]").textContent = image.alt;
  };
  shown.forEach((button, index) => button.addEventListener("click", () => { show(index); dialog.showModal(); }));
  dialog.addEventListener("click", (event) => {
    if (event.target.dataset.step) show(at + Number(event.target.dataset.step));
    else dialog.close();
  });
  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) show(at + step);
  });
}
