"use strict";

// Headings of the table of runs sort it
for (const button of document.querySelectorAll("#runs th button")) {
  button.addEventListener("click", () => {
    const header = button.parentElement, column = header.cellIndex, body = document.querySelector("#runs tbody");
    const direction = header.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
    for (const other of header.parentElement.cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", direction);
    const sign = direction === "ascending" ? 1 : -1;
    const value = row => row.cells[column].dataset.value;
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (column === 0) return sign * x.localeCompare(y);
      if (x === "nan" || y === "nan") return (x === "nan") - (y === "nan");
      return sign * (x - y);
    });
    body.append(...rows);
  });
}

// Dots of the scatter say which pair they are: at the pointer, at a touch, and by the arrow keys
const signed = value => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
for (const figure of document.querySelectorAll("figure[data-dots]")) {
  const { box: [left, top, right, bottom], x, y, rows, names, chosen, rejected, prompts } = JSON.parse(figure.dataset.dots);
  if (!rows) continue;
  const svg = figure.querySelector("svg"), view = svg.viewBox.baseVal;
  const across = value => left + (right - left) * (value - x[0]) / (x[1] - x[0]);
  const down = value => bottom - (bottom - top) * (value - y[0]) / (y[1] - y[0]);
  const places = rows.map((_, index) => [across(rejected[index]), down(chosen[index])]);
  const ring = document.createElementNS(svg.namespaceURI, "circle");
  ring.setAttribute("class", "ring");
  ring.setAttribute("r", 5);
  const picker = document.createElement("div"), readout = document.createElement("p");
  picker.className = "picker";
  picker.tabIndex = 0;
  picker.setAttribute("role", "slider");
  picker.setAttribute("aria-label", "Pair, in the order of the chosen log-ratio");
  picker.setAttribute("aria-valuemin", 1);
  picker.setAttribute("aria-valuemax", rows.length);
  picker.setAttribute("aria-valuenow", 1);
  picker.setAttribute("aria-valuetext", "none");
  picker.style.aspectRatio = `${view.width} / ${view.height}`;
  readout.className = "readout sub";
  readout.textContent = "Which pair is this? Point at a dot, or use the arrow keys.";
  figure.append(picker, readout);
  let current = -1;
  const show = index => {
    if (index === current) return;
    current = index;
    const prompt = prompts[index] && ` “${prompts[index]}”`;
    const text = `${names[index]}: chosen ${signed(chosen[index])}, rejected ${signed(rejected[index])} nats.${prompt}`;
    readout.textContent = text;
    readout.classList.remove("sub");
    picker.setAttribute("aria-valuenow", index + 1);
    picker.setAttribute("aria-valuetext", text);
    ring.setAttribute("cx", places[index][0]);
    ring.setAttribute("cy", places[index][1]);
    svg.append(ring);
  };
  const point = event => {
    const shown = svg.getBoundingClientRect(), scale = view.width / shown.width;
    const at = [(event.clientX - shown.left) * scale, (event.clientY - shown.top) * scale];
    const distances = places.map(place => Math.hypot(place[0] - at[0], place[1] - at[1]));
    const nearest = distances.reduce((best, distance, index) => distance < distances[best] ? index : best, 0);
    if (distances[nearest] < 24) show(nearest);
  };
  picker.addEventListener("pointermove", point);
  picker.addEventListener("pointerdown", point);
  picker.addEventListener("keydown", event => {
    const last = rows.length - 1;
    const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10, Home: -last, End: last };
    if (!(event.key in steps)) return;
    event.preventDefault();
    show(current < 0 ? (event.key === "End" ? last : 0) : Math.min(last, Math.max(0, current + steps[event.key])));
  });
}

// A touch on a token shows its number, which a mouse finds in the title
for (const tokens of document.querySelectorAll(".tokens")) {
  const readout = document.createElement("p");
  readout.className = "sub";
  readout.setAttribute("role", "status");
  tokens.after(readout);
  tokens.addEventListener("click", event => {
    const token = event.target.closest("i");
    if (token) readout.textContent = `${token.textContent.trim() || "Space"}: ${token.title}`;
  });
}

// Print everything, open or not
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const element of closed) element.open = true;
});
addEventListener("afterprint", () => { for (const element of closed) element.open = false; });
