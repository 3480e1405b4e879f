// Asks the server. Errors carry the server's own sentence.

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function runPath(run) {
  return `/api/runs/${encodeURIComponent(run.experiment)}/${encodeURIComponent(run.run)}`;
}

export async function fetchJson(path, signal) {
  return readAnswer(await request(path, { signal }));
}

export async function postJson(path, values, signal) {
  return readAnswer(await request(path, postOptions(values, signal)));
}

/** Send values and hand each JSON line of the answer to `take` as it arrives. */
export async function postLines(path, values, take, signal) {
  const response = await request(path, postOptions(values, signal));
  if (!response.ok) await readAnswer(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    lines.filter(Boolean).forEach((line) => take(JSON.parse(line)));
  }
}

function postOptions(values, signal) {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(values), signal };
}

async function request(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is training-lens ui still running?", 0);
  }
}

async function readAnswer(response) {
  const text = await response.text();
  let values = null;
  try {
    values = JSON.parse(text);
  } catch {
    throw new ServerError(text.slice(0, 400) || `The server answered ${response.status}.`, response.status);
  }
  if (!response.ok) throw new ServerError(values.error || `The server answered ${response.status}.`, response.status);
  return values;
}

/**
 * Follow a run's events from a step on. The stream is closed while the page is hidden, since a browser keeps few
 * connections to one server, and goes on where it stopped.
 */
export function followRun(run, since, handlers) {
  let source = null;
  let step = since;
  const open = () => {
    if (source || document.hidden) return;
    source = new EventSource(`${runPath(run)}/events?since=${step}`);
    source.onopen = () => handlers.connected(true);
    source.onerror = () => handlers.connected(false);
    source.onmessage = (event) => {
      const values = JSON.parse(event.data);
      step = Math.max(step, values.step ?? 0);
      handlers.update(values);
    };
    source.addEventListener("gone", () => {
      close();
      handlers.gone();
    });
  };
  const close = () => {
    source?.close();
    source = null;
  };
  const toggle = () => (document.hidden ? close() : open());
  document.addEventListener("visibilitychange", toggle);
  open();
  return () => {
    document.removeEventListener("visibilitychange", toggle);
    close();
  };
}
