// The viewer of answers: a filtered list, drawn as far as it is seen, and one answer beside the baseline's. Whatever a
// model said becomes text nodes, never markup.
"use strict";
(() => {
  const root = document.getElementById("answers");
  if (!root) return;
  const at = (selector) => root.querySelector(selector);
  const form = at("form"), count = at(".answers-count"), list = at(".answers-list"), detail = at(".answers-detail");
  const { make, mean, number, badge } = Answers;
  const PREFIX = "#sample=", AROUND = 8, FIELDS = ["run", "arm", "task", "verdict"];
  let rows = [], shown = [], active = -1, opened = null, height = 1;

  // --- reading what is packed

  async function unpack(element) {
    const bytes = Uint8Array.from(atob(element.textContent.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  }

  function flatten(runs) {
    const names = new Map(), found = [];
    for (const run of runs) {
      const before = names.get(run.run) || 0;
      names.set(run.run, before + 1);
      const name = before ? `${run.run} (${before + 1})` : run.run;
      for (const sample of run.samples) {
        for (const pair of sample.pairs) {
          const base = pair.base === null ? null : sample.bases[pair.base];
          const key = [name, sample.task, sample.sample, pair.arm].map(encode).join("/");
          found.push({ ...pair, run: name, baseline: run.baseline, sample, base, key, task: sample.task });
        }
      }
    }
    const rank = new Map(runs[0] ? runs[0].verdicts.map((word, i) => [word, i]) : []);
    return found.sort((a, b) => rank.get(a.verdicts[0]) - rank.get(b.verdicts[0]));
  }

  // a lone surrogate cannot be encoded
  const encode = (text) => encodeURIComponent(text.toWellFormed ? text.toWellFormed() : text);

  // --- filters

  function choices(name, all) {
    const select = form.elements[name], tally = new Map();
    const values = (row) => (name === "verdict" ? row.verdicts : [row[name]]);
    for (const row of rows) for (const value of values(row)) tally.set(value, (tally.get(value) || 0) + 1);
    select.append(make("option", { value: "" }, all));
    for (const [value, n] of tally) {
      const option = make("option", {}, name === "verdict" ? `${value} (${n.toLocaleString("en")})` : value);
      option.value = value;
      select.append(option);
    }
    return tally.size;
  }

  function fits(row, wanted, text) {
    if (wanted.run && row.run !== wanted.run) return false;
    if (wanted.arm && row.arm !== wanted.arm) return false;
    if (wanted.task && row.task !== wanted.task) return false;
    if (wanted.verdict && !row.verdicts.includes(wanted.verdict)) return false;
    return !text || searched(row).includes(text);
  }

  function searched(row) {
    const said = (side) => (side ? [side.text, side.reasoning, side.calls, side.error] : []);
    row.searched ??= [row.sample.sample, row.sample.prompt, ...said(row.base), ...said(row.answer)]
      .filter(Boolean).join("\n").toLowerCase();
    return row.searched;
  }

  function filter() {
    const wanted = Object.fromEntries(FIELDS.map((name) => [name, form.elements[name].value]));
    const text = form.elements.text.value.trim().toLowerCase();
    shown = rows.filter((row) => fits(row, wanted, text));
    active = shown.indexOf(opened);
    tell();
    list.scrollTop = 0;
    if (active >= 0) reveal();
    draw();
  }

  function tell() {
    const [some, all] = [shown.length, rows.length].map((n) => n.toLocaleString("en"));
    const left = root.dataset.leftOut;
    const rest = left === "0" ? "" : `; ${Number(left).toLocaleString("en")} more, which changed least, are not in this page`;
    count.textContent = (some === all ? `${all} answers` : `${some} of ${all} answers`) + rest;
    form.elements.csv.disabled = !shown.length;
  }

  // --- the list

  const spacer = make("div", { class: "answers-spacer", role: "presentation" });
  list.append(spacer);

  function option(row, place) {
    const score = typeof row.answer.score === "number" ? scores(row) : change(row);
    const made = make("div", {
      class: "answers-row", role: "option", id: `answer-${place}`, "aria-selected": String(place === active),
      "aria-setsize": shown.length, "aria-posinset": place + 1,
    }, badge(row.verdicts[0]), make("bdi", { class: "answers-arm" }, row.arm),
      make("bdi", { class: "answers-name" }, `${row.task} · ${row.sample.sample}`),
      make("span", { class: "answers-score" }, score));
    made.style.top = `${place * height}px`;
    made.addEventListener("click", () => open(place));
    return made;
  }

  const scores = (row) => `${row.base ? number(row.base.score, 2) : "–"} → ${number(row.answer.score, 2)}`;

  function change(row) {
    if (row.answer.kl) return `KL ${number(mean(row.answer.kl), 4)}`;
    if (!row.base || row.answer.tokens === undefined || row.base.tokens === undefined) return "";
    return `${row.base.tokens} → ${row.answer.tokens} tokens`;
  }

  function draw() {
    height = parseFloat(getComputedStyle(list).getPropertyValue("--row")) * parseFloat(getComputedStyle(list).fontSize);
    spacer.style.height = `${shown.length * height}px`;
    const first = Math.max(0, Math.floor(list.scrollTop / height) - AROUND);
    const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / height) + AROUND);
    spacer.replaceChildren(...shown.slice(first, last).map((row, i) => option(row, first + i)));
    if (active >= first && active < last) list.setAttribute("aria-activedescendant", `answer-${active}`);
    else list.removeAttribute("aria-activedescendant");
  }

  function reveal() {
    const top = active * height, bottom = top + height;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight;
  }

  // --- one answer

  function open(place, link = true) {
    if (place < 0 || place >= shown.length) return;
    active = place;
    reveal();
    draw();
    display(shown[place]);
    if (link) history.replaceState(null, "", PREFIX + opened.key);
  }

  function display(row) {
    opened = row;
    detail.replaceChildren(...Answers.view(row, rows.filter((x) => x.sample === row.sample)));
    root.dataset.opened = row.key;
    for (const mark of detail.querySelectorAll(".answers-text mark")) {
      const box = mark.closest(".answers-text");
      box.scrollTop = Math.max(0, mark.offsetTop - box.offsetTop - 40);
    }
  }

  function follow(event) {
    if (!location.hash.startsWith(PREFIX)) return;
    const key = location.hash.slice(PREFIX.length), found = rows.find((row) => row.key === key);
    if (!found) {
      detail.replaceChildren(make("p", {}, "The answer of this link is not in this page."));
    } else if (found !== opened) {
      if (!shown.includes(found)) form.reset();
      opened = found;
      filter();
      open(active, false);
    }
    if (event) detail.focus({ preventScroll: true });
    else root.scrollIntoView();
  }

  // --- keys

  const page = () => Math.max(1, Math.floor(list.clientHeight / height) - 1);
  const MOVES = {
    ArrowDown: () => active + 1, j: () => active + 1, ArrowUp: () => active - 1, k: () => active - 1,
    PageDown: () => Math.min(active + page(), shown.length - 1), PageUp: () => Math.max(active - page(), 0),
    Home: () => 0, End: () => shown.length - 1,
  };

  function key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const inside = event.currentTarget === detail;
    if (event.key in MOVES && (!inside || event.key === "j" || event.key === "k")) {
      open(MOVES[event.key]());
      if (inside) detail.focus();
    } else if (event.key === "Enter" && !inside) {
      open(Math.max(active, 0));
      detail.focus();
    } else if (event.key === "Escape" && inside) {
      list.focus();
    } else return;
    event.preventDefault();
  }

  // --- CSV

  // a spreadsheet would compute what begins like this
  const cell = (value) => {
    const text = typeof value === "string" && /^[\s]*[=+\-@\t\r]/.test(value) ? `'${value}` : String(value ?? "");
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const SIDE = ["score", "tokens", "finish", "nbytes", "nbytes_end", "dense_end", "read_end", "kept", "error", "text"];

  function csv() {
    const sides = ["baseline", "answer"].flatMap((side) => SIDE.map((name) => `${side} ${name}`));
    const more = ["first differing token", "KL", "flips", "prompt's end"];
    const lines = [["run", "method", "task", "type", "sample", "verdicts", ...sides, ...more]];
    for (const row of shown) {
      const { kl, flips } = row.answer;
      lines.push([row.run, row.arm, row.task, row.sample.type, row.sample.sample, row.verdicts.join(" "),
        ...[row.base || {}, row.answer].flatMap((side) => SIDE.map((name) => side[name])),
        row.token === null ? "" : row.token + 1, kl && mean(kl), kl && (flips || []).length, row.sample.prompt]);
    }
    return "\ufeff" + lines.map((line) => line.map(cell).join(",")).join("\r\n") + "\r\n";
  }

  function save() {
    const link = make("a", { download: "answers.csv" });
    link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  // --- start

  function listen() {
    let waiting = 0;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("change", filter);
    form.elements.text.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(filter, 120);
    });
    form.elements.csv.addEventListener("click", save);
    list.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
    list.addEventListener("keydown", key);
    detail.addEventListener("keydown", key);
    addEventListener("hashchange", follow);
    new ResizeObserver(draw).observe(list);
  }

  async function start() {
    const runs = await Promise.all([...root.querySelectorAll(".answers-packed")].map(unpack));
    rows = flatten(runs);
    root.dataset.leftOut = runs.reduce((sum, run) => sum + run.left_out, 0);
    form.hidden = at(".answers-body").hidden = false;
    at("[data-field=run]").hidden = choices("run", "all runs") < 2;
    choices("arm", "all methods");
    choices("task", "all tasks");
    choices("verdict", "all verdicts");
    detail.append(make("p", { class: "answers-hint" }, "Choose an answer to see it beside the baseline's."));
    listen();
    filter();
    follow();
    root.dataset.ready = Math.round(performance.now());
  }

  start().catch((error) => {
    count.textContent = `The answers cannot be opened here (${error.message}); records.jsonl in the run's folder has them.`;
  });
})();
