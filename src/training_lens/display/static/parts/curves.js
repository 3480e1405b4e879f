// The curves of a run: loss with validations and events, gradient norm, learning rate. They grow while it trains.

import { lineChart } from "../chart.js";
import { element, replace } from "../dom.js";
import { formatWhole } from "../format.js";

const MOST_POINTS = 1200; // of what was appended; then the curves are read anew, thinned by the server
const ZOOM_WAIT = 250; // milliseconds

export class Curves {
  constructor(box, source) {
    Object.assign(this, { box, source, curves: {}, validations: [], events: null, lastStep: 0, zoom: null, added: 0 });
    const onZoom = (first, last) => this.zoomTo(first, last);
    this.loss = lineChart({ title: "Loss, nats per supervised token", y: "loss", height: 340, onZoom, hint: "Drag across the chart to look closer; double-click to see all." });
    this.norm = lineChart({ title: "Gradient norm before clipping", y: "norm", height: 200 });
    this.rate = lineChart({ title: "Learning rate", y: "rate", height: 200, canBeLog: false });
  }

  async load(page, found) {
    this.take(await found);
    replace(this.box, this.loss.root, element("div", { class: "grid" }, this.norm.root, this.rate.root));
    this.loss.root.addEventListener("dblclick", () => this.showAll());
    this.mark(page);
  }

  take(found) {
    Object.assign(this, { curves: found.curves, validations: found.validations, lastStep: found.last_step, added: 0 });
  }

  /** New steps and validations, as the stream of events brings them. */
  add(values) {
    const { step, loss, grad_norm: norm, lr } = values.steps;
    const start = step.findIndex((number) => number > this.lastStep);
    if (start >= 0) {
      for (const [name, column] of Object.entries({ loss, grad_norm: norm, lr })) {
        this.curves[name] ??= [[], []];
        this.curves[name][0].push(...step.slice(start));
        this.curves[name][1].push(...column.slice(start));
      }
      this.lastStep = step.at(-1);
      this.added += step.length - start;
    }
    const known = new Set(this.validations.map((line) => `${line.kind}:${line.step}`));
    this.validations.push(...values.validations.filter((line) => !known.has(`${line.kind}:${line.step}`)));
    if (this.added > MOST_POINTS) this.reload();
    else this.draw();
  }

  async reload() {
    this.take(await this.source.curves());
    this.draw();
  }

  mark(page) {
    const adapterStep = page.row.status === "finished" ? page.progress.adapter_step : null;
    const isSame = JSON.stringify([page.events, adapterStep]) === JSON.stringify([this.events, this.adapterStep]);
    Object.assign(this, { events: page.events, adapterStep });
    if (!isSame) this.draw();
  }

  zoomTo(first, last) {
    clearTimeout(this.timer);
    if (!(last - first >= 1)) return;
    this.timer = setTimeout(async () => {
      this.zoom = await this.source.curves(first, last);
      this.draw();
    }, ZOOM_WAIT);
  }

  showAll() {
    this.zoom = null;
    this.draw();
  }

  draw() {
    const curves = this.zoom?.curves ?? this.curves;
    const range = this.zoom ? [this.zoom.first, this.zoom.last] : [0, Infinity];
    const validations = this.validations.filter((line) => line.step >= range[0] && line.step <= range[1]);
    this.loss.draw([
      curveLine("training", curves.loss, "--adapter", { alpha: curves.loss_mean ? 0.4 : 1, width: 1.2 }),
      curveLine("training, mean of neighbours", curves.loss_mean, "--mean", { width: 1.8 }),
      pointLine("base, held-out rows", validations, "base", "--base"),
      pointLine("adapter, validation sample", validations, "validation_sample", "--sample"),
      pointLine("adapter, all held-out rows", validations, "validation", "--fine"),
    ].filter((line) => line.steps.length), this.marks(range));
    this.norm.draw([curveLine("gradient norm", curves.grad_norm, "--adapter")]);
    this.rate.draw([curveLine("learning rate", curves.lr, "--adapter")]);
  }

  marks([first, last]) {
    if (!this.events) return [];
    const epochs = this.events.epochs.map((step, i) => ({ step, label: `end of epoch ${i + 1}`, color: "--control" }));
    const findings = this.events.findings.filter((event) => event.event === "raised")
      .map((event) => ({ step: event.step, label: event.title, color: event.severity === "problem" ? "--problem" : "--warning" }));
    const kept = this.adapterStep ? [{ step: this.adapterStep, label: `kept: step ${formatWhole(this.adapterStep)}`, color: "--fine" }] : [];
    return [...epochs, ...findings, ...kept].filter((mark) => mark.step >= first && mark.step <= last);
  }
}

function curveLine(name, curve, color, more = {}) {
  const [steps, values] = curve ?? [[], []];
  return { name, steps, values, color, ...more };
}

function pointLine(name, validations, kind, color) {
  const lines = validations.filter((line) => line.kind === kind && line.loss !== null);
  return { name, steps: lines.map((line) => line.step), values: lines.map((line) => line.loss), color, kind: "dots" };
}
