// The page is whole without this. It tells the number under the pointer, which it reads from the
// table beside a figure, and shows one of many figures at a time.
(() => {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  document.body.append(tip);
  let shown = null;

  const named = (what, text) => (what && text ? `${what} ${text}` : text || what);

  // Every number of a plot: where it is in the SVG, and what it says.
  function targetsOf(plot) {
    const tables = plot.closest("figure").querySelectorAll(".numbers table");
    const found = [];
    JSON.parse(plot.dataset.places).forEach((places, index) => {
      const table = tables[index];
      const { row: rowNoun, column: columnNoun, what } = table.dataset;
      const heads = [...table.rows[0].cells].slice(1).map((cell) => cell.textContent);
      const rows = [...table.rows].slice(1);
      const [kind, ...numbers] = places;
      rows.forEach((row, i) =>
        heads.forEach((head, j) => {
          const value = row.cells[j + 1].textContent;
          if (!value) return;
          const target = { a: row.cells[0].textContent, b: head, what, value, series: j, table: index };
          target.names = [named(rowNoun, target.a), named(columnNoun, head)];
          if (kind) {
            const at = 2 * (i * heads.length + j);
            if (numbers[at] === null) return;
            [target.x, target.y] = [numbers[at], numbers[at + 1]];
          } else {
            const [left, top, width, height] = numbers;
            target.w = width / heads.length;
            target.h = height / rows.length;
            target.x = left + (j + 0.5) * target.w;
            target.y = top + height - (i + 0.5) * target.h;
          }
          found.push(target);
        }),
      );
    });
    return found;
  }

  function hide() {
    if (!shown) return;
    shown.mark.remove();
    shown = null;
    tip.hidden = true;
  }

  function show(plot, target, keyboard = false) {
    if (shown && shown.target === target) return;
    hide();
    const svg = plot.querySelector("svg");
    const mark = document.createElementNS(SVG, target.w ? "rect" : "circle");
    const set = (values) => Object.entries(values).forEach(([key, value]) => mark.setAttribute(key, value));
    if (target.w) {
      set({ x: target.x - target.w / 2, y: target.y - target.h / 2, width: target.w, height: target.h });
    } else {
      set({ cx: target.x, cy: target.y, r: 3.4 });
    }
    mark.setAttribute("class", "mark");
    svg.append(mark);
    shown = { plot, target, mark, keyboard };
    tip.replaceChildren();
    const strong = document.createElement("strong");
    strong.textContent = target.value;
    const first = document.createElement("span");
    first.textContent = target.names.filter(Boolean).join(" · ");
    const second = document.createElement("span");
    second.textContent = target.what;
    tip.append(strong, first, second);
    tip.hidden = false;
    place();
  }

  // At the mark, inside the window.
  function place() {
    const box = shown.mark.getBoundingClientRect();
    const own = tip.getBoundingClientRect();
    const x = Math.min(Math.max(box.left + box.width / 2 - own.width / 2, 6), innerWidth - own.width - 6);
    const above = box.top - own.height - 8;
    tip.style.left = `${Math.max(x, 6)}px`;
    tip.style.top = `${above > 6 ? above : box.bottom + 8}px`;
  }

  // The target at a place of the screen: the cell that holds it, or the point that is nearest.
  function under(svg, targets, event) {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let best = null;
    let least = 18;
    for (const target of targets) {
      const [x, y] = [Math.abs(place.x - target.x), Math.abs(place.y - target.y)];
      if (target.w) {
        if (x <= target.w / 2 && y <= target.h / 2) return target;
      } else if (Math.hypot(x, y) < least) {
        least = Math.hypot(x, y);
        best = target;
      }
    }
    return best;
  }

  // The nearest target in a direction; along a line before across lines.
  function beside(targets, from, dx, dy) {
    let best = null;
    let least = Infinity;
    for (const target of targets) {
      const along = (target.x - from.x) * dx + (target.y - from.y) * dy;
      const across = Math.abs((target.x - from.x) * dy) + Math.abs((target.y - from.y) * dx);
      if (along < 0.05) continue;
      const other = dx && !target.w && target.series !== from.series ? 1000 : 0;
      const cost = along + 4 * across + other + (target.table === from.table ? 0 : 500);
      if (cost < least) [least, best] = [cost, target];
    }
    return best;
  }

  // A page that scrolls under a pointer at rest is told of moves, which are none.
  let resting = false;
  let last = "";
  const follow = ({ clientX, clientY }) => {
    resting = last === `${clientX} ${clientY}`;
    last = `${clientX} ${clientY}`;
  };
  addEventListener("pointermove", follow, { passive: true, capture: true });

  const KEYS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  for (const plot of document.querySelectorAll(".plot[data-places]")) {
    const svg = plot.querySelector("svg");
    let targets = null;
    const all = () => (targets ??= targetsOf(plot));
    const choose = () => plot.dataset.chooses && shown && choosePair(shown.target.a, shown.target.b);
    plot.tabIndex = 0;
    plot.setAttribute("role", "group");
    plot.setAttribute("aria-label", "Figure; arrow keys tell its numbers one by one");
    const point = (event) => {
      const target = under(svg, all(), event);
      if (target) show(plot, target);
      else hide();
    };
    plot.addEventListener("pointermove", (event) => resting || point(event));
    plot.addEventListener("pointerdown", point);
    plot.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse" && !shown?.keyboard) hide();
    });
    plot.addEventListener("click", choose);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      if (event.key === "Enter") choose();
      const step = KEYS[event.key];
      if (!step || !all().length) return;
      event.preventDefault();
      const here = shown && shown.plot === plot ? shown.target : null;
      const next = here ? beside(all(), here, ...step) : all()[0];
      if (next) show(plot, next, true);
    });
  }
  addEventListener("keydown", (event) => event.key === "Escape" && hide());
  // A pointer is elsewhere after scrolling; what the keyboard has chosen moves along.
  addEventListener("scroll", () => shown && (shown.keyboard ? place() : hide()), { passive: true, capture: true });
  document.addEventListener("pointerdown", (event) => event.target.closest(".plot") || hide());

  let choosePair = () => {};
  for (const box of document.querySelectorAll(".choose")) {
    const items = [...box.children];
    const bar = document.createElement("div");
    bar.className = "bar";
    const selects = box.dataset.labels.split("|").map((text) => {
      const label = document.createElement("label");
      const select = document.createElement("select");
      label.append(text, select);
      bar.append(label);
      return select;
    });
    const [first, second] = selects;
    const names = [...new Set(items.flatMap((item) => [item.dataset.a, item.dataset.b]).filter(Boolean))];
    const find = (a, b) =>
      items.find(({ dataset }) =>
        second
          ? (dataset.a === a && dataset.b === b) || (dataset.a === b && dataset.b === a)
          : dataset.a === a,
      );
    const fill = (select, options, value) => {
      select.replaceChildren(...options.map((name) => new Option(name, name, false, name === value)));
    };
    const update = () => {
      if (second) fill(second, names.filter((name) => find(first.value, name)), second.value);
      const item = find(first.value, second && second.value);
      hide();
      for (const other of items) other.classList.toggle("chosen", other === item);
    };
    const choose = (a, b) => {
      first.value = a;
      if (second) {
        fill(second, names.filter((name) => find(a, name)), b);
      }
      update();
    };
    fill(first, names, items[0].dataset.a);
    if (second) fill(second, names.filter((name) => find(first.value, name)), items[0].dataset.b);
    for (const select of selects) select.addEventListener("change", update);
    box.prepend(bar);
    if (box.id === "pairs") {
      choosePair = (a, b) => {
        choose(a, b);
        box.scrollIntoView({ block: "start" });
      };
    }
  }
})();
