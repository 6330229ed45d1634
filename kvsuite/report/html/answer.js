// One answer beside the baseline's, as elements. Whatever a model said becomes text nodes, never markup.
"use strict";
const Answers = (() => {
  const MIB = 1024 * 1024, SVG = document.querySelector(".answers-svg")?.namespaceURI;

  function make(tag, attributes, ...inside) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
    made.append(...inside.filter((x) => x !== null && x !== undefined && x !== ""));
    return made;
  }

  const known = (x) => typeof x === "number";
  const mean = (xs) => xs.reduce((sum, x) => sum + x, 0) / xs.length;
  const number = (x, digits) => (known(x) ? x.toFixed(digits) : "–");
  const badge = (word) => make("span", { class: "answers-badge", "data-verdict": word }, word);

  // --- figures: a row's name, and what stands for a side; a row in which nothing is known is left out

  const share = (part, whole) => (part && whole ? `${number((100 * part) / whole, 1)} %` : null);
  const lost = (name) => (side) => (side.loss && known(side.loss[name]) ? `${number(100 * side.loss[name], 1)} %` : null);
  const FIGURES = [
    ["score", (side) => (known(side.score) ? number(side.score, 2) : null)],
    ["tokens of the answer", (side) => (known(side.tokens) ? `${side.tokens} of at most ${side.cap}` : null)],
    ["ended", (side) => ({ stop: "by itself", length: "by the cap" })[side.finish] || side.finish || null],
    ["tokens of the prompt", (side) => side.prompt_tokens ?? null],
    ["cache holds of the prompt's tokens", (side, base) => share(side.kept, base && base.kept)],
    ["cache after the prompt", (side) => (side.nbytes ? `${number(side.nbytes / MIB, 2)} MiB` : null)],
    ["that beside the baseline's", (side, base) => share(side.nbytes, base && base.nbytes)],
    ["cache at the end, of K and V uncompressed", (side) => share(side.nbytes_end, side.dense_end)],
    ["read by the last step, of what is held", (side) => share(side.read_end, side.nbytes_end)],
    ["empty slots at the end", (side) => (side.fragmentation ? share(side.fragmentation, 1) : null)],
    ["codec / backend", (side) => side.path ?? null],
    ["perplexity of the forced text", (side) => (known(side.perplexity) ? number(side.perplexity, 3) : null)],
    ["KL from the baseline, mean, nats", (side) => (side.kl ? number(mean(side.kl), 5) : null)],
    ["another most likely token", (side) => (side.kl ? `at ${(side.flips || []).length} of ${side.kl.length}` : null)],
    ["the reference's sentence", (side) => (side.loss && side.loss.span) || null],
    ["of its tokens kept when the answer begins", lost("span_kept")],
    ["heads that hold none of them", lost("span_gone")],
    ["attention to tokens not held, over the answer", lost("attention")],
    ["the same where the answers part", lost("parting")],
    ["error of K, of that sentence", lost("span_k_error")],
    ["error of V, of that sentence", lost("span_v_error")],
    ["error of K, of the prompt", lost("k_error")],
    ["error of V, of the prompt", lost("v_error")],
    ["seconds to the first token", (side) => (side.ttft ? number(side.ttft, 2) : null)],
    ["seconds to the end", (side) => (side.e2e ? number(side.e2e, 2) : null)],
  ];

  function figures(row) {
    const body = make("tbody");
    for (const [name, told] of FIGURES) {
      const [before, after] = [row.base, row.answer].map((side) => (side ? told(side, row.base) : null));
      if (before === null && after === null) continue;
      body.append(make("tr", {}, make("th", { scope: "row" }, name), cell(before), cell(after)));
    }
    const names = [row.baseline, row.arm].map((name) => make("th", { scope: "col" }, make("bdi", {}, name)));
    const corner = make("td");
    return make("table", { class: "answers-figures" }, make("thead", {}, make("tr", {}, corner, ...names)), body);
  }

  const cell = (value) => make("td", {}, value === null ? "–" : make("bdi", {}, String(value)));

  // --- texts

  // control characters would not be seen
  const visible = (text) =>
    text.replace(/[\0-\x08\x0b-\x1f\x7f]/g, (c) => (c === "\x7f" ? "\u2421" : String.fromCharCode(0x2400 + c.charCodeAt(0))));

  function text(said, name, place = null) {
    const box = make("div", { class: "answers-text", tabindex: "0", role: "region", "aria-label": name, dir: "auto" });
    if (place === null) {
      box.append(said ? visible(said) : make("i", {}, "(empty)"));
      return box;
    }
    const points = Array.from(said), rest = points.slice(place);
    const length = Math.max(1, rest.findIndex((c) => /\s/.test(c)) < 0 ? rest.length : rest.findIndex((c) => /\s/.test(c)));
    box.append(visible(points.slice(0, place).join("")));
    const marked = visible(rest.slice(0, length).join("")).replace("\n", "⏎\n");
    box.append(rest.length ? make("mark", {}, marked) : make("mark", { class: "answers-end" }, "ends here"));
    box.append(visible(rest.slice(length).join("")));
    return box;
  }

  function side(name, answer, place, base) {
    const made = make("div", { class: "answers-side" }, make("h4", {}, base && name !== "baseline" ? "baseline: " : "", make("bdi", {}, name)));
    if (!answer) return made.append(make("p", {}, "no answer")), made;
    if (answer.error) made.append(make("p", { class: "answers-error" }, "failed: ", make("bdi", {}, answer.error)));
    else made.append(text(answer.text || "", `answer of ${name}`, place));
    for (const what of ["reasoning", "calls"]) {
      if (answer[what]) made.append(make("h5", {}, what), text(answer[what], `${what} of ${name}`));
    }
    return made;
  }

  function difference(row) {
    if (row.token !== null) return `The first differing token is number ${row.token + 1}.`;
    if (row.character !== null) return `The first differing character is number ${row.character + 1}.`;
    return row.verdicts.includes("same") && !row.answer.kl ? "The answers are identical." : "";
  }

  // --- forced text: KL by position, flips marked

  function chart(answer) {
    const top = Math.max(...answer.kl), n = answer.kl.length, flips = new Set(answer.flips || []);
    const at = answer.kl.indexOf(top) + 1;
    const said = `KL at each of ${n} positions, at most ${number(top, 4)} nats, at position ${at}`;
    const svg = document.createElementNS(SVG, "svg");
    for (const [name, value] of Object.entries({ viewBox: `0 0 ${n} 110`, preserveAspectRatio: "none", role: "img" })) {
      svg.setAttribute(name, value);
    }
    svg.setAttribute("aria-label", said);
    answer.kl.forEach((kl, i) => {
      const bar = top ? Math.max((100 * kl) / top, 0.5) : 0.5;
      svg.append(rectangle(i, 100 - bar, bar, flips.has(i) ? "answers-flip" : "answers-bar"));
      if (flips.has(i)) svg.append(rectangle(i, 103, 7, "answers-flip"));
    });
    const where = [...flips].map((i) => i + 1).join(", ");
    const told = flips.size ? `Another most likely token (marked below the bars) at ${where}.` : "The same most likely tokens.";
    return make("figure", { class: "answers-chart" }, svg, make("figcaption", {}, `${said}. ${told}`));
  }

  function rectangle(x, y, height, name) {
    const made = document.createElementNS(SVG, "rect");
    for (const [key, value] of Object.entries({ x: x + 0.1, y, width: 0.8, height, class: name })) made.setAttribute(key, value);
    return made;
  }

  // --- the whole

  function others(row, siblings) {
    const made = make("ul", { class: "answers-others", "aria-label": "this sample's answers" });
    for (const other of siblings) {
      const link = make("a", { href: `#sample=${other.key}` }, make("bdi", {}, other.arm));
      if (other === row) link.setAttribute("aria-current", "true");
      made.append(make("li", {}, link, " ", badge(other.verdicts[0])));
    }
    return made;
  }

  // what `row` shows; `siblings` are all arms' answers to its sample
  function view(row, siblings) {
    const link = make("a", { href: `#sample=${row.key}`, class: "answers-link" }, "link to this answer");
    const prompt = row.sample.prompt
      ? text(row.sample.prompt, "end of the prompt")
      : make("p", { class: "answers-hint" }, "This run did not record its prompts.");
    const sides = [side(row.baseline, row.base, row.character, true), side(row.arm, row.answer, row.character, false)];
    const failed = sides.some((made) => made.querySelector(".answers-error"));
    return [
      make("h3", {}, make("bdi", {}, row.sample.sample)),
      make("p", { class: "answers-head" }, make("bdi", {}, row.arm), " · ", make("bdi", {}, row.task),
        row.sample.type && row.sample.type !== row.task ? ` (${row.sample.type})` : "", " ", ...row.verdicts.map(badge), " ", link),
      row.answer.kl && !failed ? chart(row.answer) : make("div", { class: "answers-sides" }, ...sides),
      make("p", { class: "answers-difference" }, difference(row)),
      figures(row),
      make("h4", {}, "End of the prompt"), prompt,
      siblings.length > 1 ? make("h4", {}, "The same sample") : null,
      siblings.length > 1 ? others(row, siblings) : null,
    ].filter(Boolean);
  }

  return { make, mean, number, badge, view };
})();
