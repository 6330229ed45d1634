"use strict";

// cost of a million tokens at the price that is typed
const digits = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
for (const field of document.querySelectorAll("[data-price]")) {
  field.addEventListener("input", () => {
    const price = Number.parseFloat(field.value.replace(",", "."));
    for (const cell of field.closest("section").querySelectorAll("[data-rate]")) {
      const cost = (price / 3600 / Number(cell.dataset.rate)) * 1e6;
      cell.textContent = price >= 0 && Number.isFinite(cost) ? digits.format(cost) : "–";
    }
  });
}

// records: gzip in base64, made a file when they are asked for
async function save(button) {
  const packed = Uint8Array.from(atob(document.getElementById(button.dataset.file).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([await new Response(stream).arrayBuffer()], { type: "text/csv" }));
  link.download = button.dataset.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
for (const button of document.querySelectorAll("[data-file]")) {
  button.addEventListener("click", () => save(button));
}

// paper has no clicks: all tables are open there
const closed = [];
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details:not([open])")) {
    part.open = true;
    closed.push(part);
  }
});
addEventListener("afterprint", () => {
  for (const part of closed.splice(0)) part.open = false;
});
