// Numbers, times and sizes for people.

const WHOLE = new Intl.NumberFormat("en-US");
const DATE = new Intl.DateTimeFormat("sv-SE", { dateStyle: "short", timeStyle: "short" });

export function formatWhole(value) {
  return value === null || value === undefined ? "–" : WHOLE.format(Math.round(value));
}

/** Four significant digits: 9.853, 0.2122, 1.0e-5. */
export function formatNumber(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return value.toExponential(1).replace("e+", "e");
  if (size >= 1000) return WHOLE.format(Math.round(value));
  return Number.isInteger(value) ? String(value) : value.toPrecision(4);
}

/** A learning rate: 1e-4, 3.2e-5. */
export function formatRate(value) {
  return value === null || value === undefined ? "–" : value.toExponential(2).replace(/\.?0+e/, "e");
}

export function formatPercent(value, digits = 1) {
  return value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)}%`;
}

/** A change with its sign; none of a change that is 0. */
export function formatChange(change, format) {
  return `${change > 0 ? "+" : change < 0 ? "−" : ""}${format(Math.abs(change))}`;
}

export function formatSeconds(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  seconds = Math.round(seconds);
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 600) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.round(hours / 24)} days`;
}

export function formatBytes(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (bytes < 1000) return `${unit === "B" ? bytes : bytes.toPrecision(3)} ${unit}`;
    bytes /= 1000;
  }
  return `${bytes.toPrecision(3)} TB`;
}

/** "3 min ago", or a date. */
export function formatAge(seconds) {
  const age = Date.now() / 1000 - seconds;
  if (age < 90) return "just now";
  if (age < 3600 * 36) return `${formatSeconds(age)} ago`;
  return formatDate(seconds);
}

export function formatDate(seconds) {
  return DATE.format(seconds * 1000);
}

export function formatValue(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}

export function pluralize(count, noun) {
  return `${formatWhole(count)} ${noun}${count === 1 ? "" : "s"}`;
}

export function capitalize(words) {
  return words.charAt(0).toUpperCase() + words.slice(1);
}

const MEASURES = { token_f1: "Token F1", rougeL: "ROUGE-L", chrf: "chrF", bleu: "BLEU", forward_kl: "KL to the base", json_fields: "JSON fields" };

/** A measure's name: exact_match is "Exact match". */
export function nameMeasure(measure) {
  return MEASURES[measure] ?? capitalize(measure.replaceAll("_", " "));
}
