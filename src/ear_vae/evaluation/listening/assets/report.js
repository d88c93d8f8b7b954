// Builds the page from its data. Names come from files: they are only ever set as text.

const data = JSON.parse(document.getElementById("data").textContent);
const player = new Player(data.excerpts);
const abx = new AbxDialog(player, data.excerpts.map(excerptTitle), data.systems);
const byId = (id) => document.getElementById(id);
const views = [];

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function button(text, attributes, onClick) {
  const made = make("button", { type: "button", ...attributes }, ...[text].flat());
  made.addEventListener("click", onClick);
  return made;
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function clock(seconds) {
  const tenths = Math.round(10 * seconds);
  const rest = (tenths % 600) / 10;
  return `${Math.floor(tenths / 600)}:${rest < 10 ? "0" : ""}${rest.toFixed(1)}`;
}

function excerptTitle({ name, start, seconds }) {
  return `${name}, ${clock(start)}–${clock(start + seconds)}`;
}

function signed(value, decimals) {
  const text = Math.abs(value).toFixed(decimals);
  if (Number(text) === 0) return text;
  return (value < 0 ? "−" : "+") + text;
}

// Metrics as rows and systems as columns, which a phone can show without scrolling.
function metricTable(caption, rows, captionId) {
  const head = make("tr", {}, make("th", { scope: "col" }, "Metric"));
  data.systems.slice(1).forEach((name, index) => {
    const mark = make("span", { class: `dot signal-${(index + 1) % 8}`, "aria-hidden": "true" });
    head.append(make("th", { scope: "col" }, mark, name));
  });
  const body = make("tbody");
  for (const { label, unit, about, higher, cells } of rows) {
    const direction = make("span", { class: "direction", "aria-hidden": "true" }, higher ? " ↑" : " ↓");
    const spoken = make("span", { class: "hidden" }, higher ? " (higher is better)" : " (lower is better)");
    const name = make("th", { scope: "row" }, label);
    name.append(make("span", { class: "unit" }, unit ? ` ${unit}` : ""), direction, spoken);
    name.append(make("span", { class: "about" }, about));
    const line = make("tr", {}, name);
    for (const { text, best } of cells) {
      const cell = make("td", best ? { class: "best" } : {}, text);
      if (best) cell.append(make("span", { class: "hidden" }, " (best)"));
      line.append(cell);
    }
    body.append(line);
  }
  const table = make("table", { class: "metrics" });
  table.append(make("caption", captionId ? { id: captionId } : {}, caption), make("thead", {}, head), body);
  table.style.setProperty("--systems", data.systems.length - 1);
  return make("div", { class: "scrolls", tabindex: "0", role: "region", "aria-label": caption }, table);
}

class ExcerptView {
  constructor(row) {
    this.row = row;
    this.excerpt = data.excerpts[row];
    this.drawn = false;
    this.columns = data.systems.map((_, column) => this.column(column));
    const { name, start, seconds, rate, headroom, rows } = this.excerpt;
    const title = make("h2", { id: `excerpt-${row}` }, name);
    const facts = [`${clock(start)}–${clock(start + seconds)}`, `${rate / 1000} kHz`];
    if (headroom < 0.9995) facts.push(`all lowered by ${(-20 * Math.log10(headroom)).toFixed(1)} dB so that none clips`);
    this.play = button("Play", { class: "primary" }, () => this.toggle());
    this.play.setAttribute("aria-describedby", title.id);
    const head = make("div", { class: "excerpt-head" });
    head.append(make("div", {}, title, make("p", { class: "quiet" }, facts.join(" · "))), this.play);
    this.section = make("section", { class: "card excerpt", "aria-labelledby": title.id }, head);
    this.drawing = make("p", { class: "drawing", role: "status" }, "Drawing the pictures…");
    const grid = make("div", { class: "grid" });
    grid.append(...this.columns.map((column) => column.element));
    this.section.append(this.drawing, grid, metricTable(`Metrics of this excerpt: ${name}`, rows));
    const notes = this.excerpt.signals.flatMap((signal, column) =>
      signal.notes.map((note) => make("li", {}, `${data.systems[column]}: ${note}`)),
    );
    if (notes.length) this.section.append(make("ul", { class: "notes", "aria-label": "Notes" }, ...notes));
  }

  column(column) {
    const name = data.systems[column];
    const signal = this.excerpt.signals[column];
    const gain = column ? `${signed(signal.gainDb, 1)} dB to match` : "reference level";
    const label = [make("span", { class: "name" }, name), make("span", { class: "gain" }, gain)];
    if (column < 9) label.push(make("kbd", { "aria-hidden": "true" }, String(column + 1)));
    const hear = button(label, { class: "hear-it", "aria-pressed": "false" }, () => this.hear(column));
    const element = make("div", { class: `column signal-${column % 8}`, role: "group", "aria-label": name });
    element.append(hear);
    const pictures = {};
    const add = (kind, caption, description) => {
      const canvas = make("canvas", { role: "img", "aria-label": description });
      const frame = make("div", { class: `picture ${kind}` }, canvas, make("span", { class: "playhead" }));
      frame.addEventListener("click", (event) => this.hearAt(column, event, frame));
      element.append(make("figure", {}, frame, make("figcaption", {}, caption)));
      pictures[kind] = canvas;
    };
    add("waveform", "Waveform", `Waveform of ${name}`);
    add("levels", "Spectrogram", `Spectrogram of ${name}`);
    this.addScale(pictures.levels.parentElement);
    if (column) {
      add("difference", "Level difference", `Where ${name} is louder or quieter than the original`);
      add("residual", "Residual", `Spectrogram of the difference of ${name} and the original`);
    } else element.append(this.differenceLegend(), this.levelLegend());
    add("stereo", this.stereoCaption(signal), `Mid, side and correlation of ${name} over time`);
    return { element, hear, pictures };
  }

  addScale(frame) {
    const top = Math.min(HIGHEST_HZ, this.excerpt.rate / 2);
    for (const [hz, text] of [[100, "100"], [1000, "1 k"], [10000, "10 k"]]) {
      if (hz >= top) continue;
      const tick = make("span", { class: "tick", "aria-hidden": "true" }, text);
      tick.style.bottom = `${(100 * Math.log(hz / LOWEST_HZ)) / Math.log(top / LOWEST_HZ)}%`;
      frame.append(tick);
    }
  }

  differenceLegend() {
    const ends = make("p", {}, make("span", {}, `−${LARGEST_DIFFERENCE_DB} dB`), make("span", {}, "equal"));
    ends.append(make("span", {}, `+${LARGEST_DIFFERENCE_DB} dB`));
    const bar = make("div", { class: "ramp ramp-difference" });
    return make("div", { class: "legend", "aria-hidden": "true" }, "Level difference", bar, ends);
  }

  levelLegend() {
    const ends = make("p", {}, make("span", {}, `−${RANGE_DB} dB`), make("span", {}, "loudest"));
    const bar = make("div", { class: "ramp ramp-level" });
    return make("div", { class: "legend", "aria-hidden": "true" }, "Spectrogram and residual", bar, ends);
  }

  stereoCaption({ correlation, sideDb }) {
    const facts = ["Stereo"];
    if (correlation !== null) facts.push(`correlation ${correlation.toFixed(2).replace("-", "−")}`);
    if (sideDb !== null) facts.push(`side ${signed(sideDb, 1)} dB`);
    else facts.push("no side");
    return facts.join(" · ");
  }

  hear(column) {
    player.select(this.row);
    player.choose(column);
    player.play();
  }

  hearAt(column, event, frame) {
    const { left, width } = frame.getBoundingClientRect();
    player.select(this.row);
    player.choose(column);
    player.seek(((event.clientX - left) / width) * this.excerpt.seconds);
    player.play();
  }

  toggle() {
    if (player.row === this.row) player.toggle();
    else {
      player.select(this.row);
      player.play();
    }
  }

  update() {
    const here = player.row === this.row;
    this.section.classList.toggle("current", here);
    this.play.textContent = here && player.wanted ? "Pause" : "Play";
    this.columns.forEach(({ element, hear }, column) => {
      // A narrow screen has room for the pictures of one.
      if (!player.blind) element.classList.toggle("chosen", player.column === column);
      hear.setAttribute("aria-pressed", String(here && !player.blind && player.column === column));
    });
  }

  async draw() {
    const channels = (await player.buffers.get(this.row)).map((buffer) =>
      Array.from({ length: buffer.numberOfChannels }, (_, index) => buffer.getChannelData(index)),
    );
    const { rate, signals, headroom } = this.excerpt;
    // At the levels that are heard, but for the attenuation that all have in common.
    const gains = signals.map(({ matched }) => matched / headroom);
    const scaled = channels.map((all, column) => all.map((samples) => samples.map((x) => x * gains[column])));
    const peak = scaled.flat().reduce((most, samples) => samples.reduce((m, x) => Math.max(m, Math.abs(x)), most), 1e-6);
    const original = spectrogram(scaled[0], rate);
    const topDb = decibels(original.reduce((most, power) => Math.max(most, power), 0));
    const scale = ["--quieter", "--ground", "--louder"].map((name) => colour(name).split(",").map(Number));
    for (const [column, { pictures }] of this.columns.entries()) {
      const ink = colour(`--signal-${column % 8}`);
      paintWaveform(pictures.waveform, scaled[column], 1 / peak, ink);
      paintStereo(pictures.stereo, scaled[column], topDb + 6, ink, colour("--line"));
      const picture = column ? spectrogram(scaled[column], rate) : original;
      paintLevels(pictures.levels, picture, topDb);
      if (column) {
        paintDifference(pictures.difference, picture, original, topDb, scale);
        const residual = scaled[column].map((samples, index) => samples.map((x, n) => x - scaled[0][index][n]));
        paintLevels(pictures.residual, spectrogram(residual, rate), topDb);
      }
      // Between signals the page may react.
      await new Promise((resolve) => setTimeout(resolve));
    }
    this.drawing.hidden = true;
    this.section.dataset.drawn = "";
  }
}

function describe() {
  const systems = data.systems.length - 1;
  const longest = Math.max(...data.excerpts.map(({ seconds }) => seconds));
  const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
  byId("title").textContent = data.title;
  byId("lead").textContent =
    `${counted(systems, "system")} beside the original in ${counted(data.excerpts.length, "excerpt")} of up to ` +
    `${longest.toFixed(1).replace(".0", "")} s, at the same integrated loudness. Made with ear-vae ${data.version}.`;
}

function update() {
  const excerpt = data.excerpts[player.row];
  for (const view of views) view.update();
  byId("play").setAttribute("aria-label", player.wanted ? "Pause" : "Play");
  byId("play").classList.toggle("playing", player.wanted);
  byId("playing-name").textContent = `${player.row + 1}/${data.excerpts.length}  ${excerpt.name}`;
  byId("seek").max = excerpt.seconds;
  byId("previous").disabled = player.row === 0;
  byId("next").disabled = player.row === data.excerpts.length - 1;
  byId("loop").setAttribute("aria-pressed", String(player.loop));
  byId("match").setAttribute("aria-pressed", String(player.matched));
  [...byId("bar-signals").children].forEach((child, column) => {
    child.setAttribute("aria-pressed", String(!player.blind && player.column === column));
  });
  moved();
}

function moved() {
  const { position, duration } = player;
  const text = `${position.toFixed(1)} of ${duration.toFixed(1)} s`;
  // A value that is being announced over and over cannot be listened to.
  if (byId("seek").value !== position.toFixed(1)) {
    byId("seek").value = position.toFixed(1);
    byId("seek").setAttribute("aria-valuetext", text);
    byId("time").textContent = text;
  }
  views[player.row].section.style.setProperty("--at", position / duration);
}

function animate() {
  if (player.playing) moved();
  requestAnimationFrame(animate);
}

function announce(text) {
  byId("announcement").textContent = text;
}

function choose(column) {
  if (column >= data.systems.length) return;
  player.choose(column);
  announce(`You hear ${data.systems[column]}`);
}

function go(step) {
  const row = player.row + step;
  if (row < 0 || row >= views.length) return;
  player.select(row);
  views[row].section.scrollIntoView({ block: "nearest" });
  announce(excerptTitle(data.excerpts[row]));
}

const KEYS = {
  " ": () => player.toggle(),
  arrowleft: () => player.seek(player.position - 1),
  arrowright: () => player.seek(player.position + 1),
  home: () => player.seek(0),
  p: () => go(-1),
  n: () => go(1),
  l: () => player.repeat(!player.loop),
  m: () => player.match(!player.matched),
  t: () => abx.start(),
};

let usedPointer = false;

function onKey(event) {
  if (event.key === "Tab") usedPointer = false;
  if (event.ctrlKey || event.metaKey || event.altKey || !byId("shortcuts").checked) return;
  const key = event.key.toLowerCase();
  const control = event.target.closest?.("button, summary, input, select");
  // What a control does with a key of its own comes first, but a button that was clicked with the mouse is no
  // longer meant when Space is pressed.
  const meant = control && !(usedPointer && key === " " && control.matches("button, input[type=range]"));
  if (meant && (key === " " || key === "enter")) return;
  if (event.target.matches?.("input[type=range], select, .scrolls") && /^(arrow|home|end)/.test(key)) return;
  if (event.target.matches?.("select")) return;
  let done = true;
  if (abx.open) done = abx.key(key);
  else if (/^[1-9]$/.test(key)) choose(Number(key) - 1);
  else if (Object.hasOwn(KEYS, key)) KEYS[key]();
  else done = false;
  if (done) event.preventDefault();
}

function connect() {
  byId("play").addEventListener("click", () => player.toggle());
  byId("previous").addEventListener("click", () => go(-1));
  byId("next").addEventListener("click", () => go(1));
  byId("seek").addEventListener("input", (event) => player.seek(Number(event.target.value)));
  byId("loop").addEventListener("click", () => player.repeat(!player.loop));
  byId("match").addEventListener("click", () => player.match(!player.matched));
  byId("open-abx").addEventListener("click", () => abx.start());
  document.addEventListener("keydown", onKey);
  document.addEventListener("pointerdown", () => {
    usedPointer = true;
  });
  player.addEventListener("change", update);
}

// Pictures are drawn as they come near: all at once would take seconds.
function drawWhenNear() {
  const redraw = (view) => view.draw().catch((error) => {
    view.drawing.textContent = `The pictures cannot be drawn: ${error.message}`;
  });
  const observer = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        const view = views.find(({ section }) => section === target);
        if (!isIntersecting || view.drawn) continue;
        view.drawn = true;
        redraw(view);
      }
    },
    { rootMargin: "600px" },
  );
  for (const view of views) observer.observe(view.section);
  const again = () => views.filter((view) => view.drawn).forEach(redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
}

describe();
byId("means").append(metricTable(data.means.caption, data.means.rows, "means-caption"));
views.push(...data.excerpts.map((_, row) => new ExcerptView(row)));
byId("excerpts").append(...views.map(({ section }) => section));
byId("bar-signals").append(
  ...data.systems.map((name, column) => {
    const mark = make("span", { class: `dot signal-${column % 8}`, "aria-hidden": "true" });
    return button([mark, name], { "aria-pressed": "false" }, () => choose(column));
  }),
);
document.querySelector(".bar").classList.toggle("crowded", data.systems.length > 5);
connect();
update();
drawWhenNear();
requestAnimationFrame(animate);
