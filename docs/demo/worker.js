// The model of the demo page, in a thread of its own: the page stays responsive while it loads and answers.
// Messages to it: { id, act: "load" or "classify", ... }. Each is answered by { id, done } or { id, failed, damaged },
// where `damaged` says that all files came and the model still does not open; before that { id, stage, bytes, total }.
const opened = new Map(); // model -> its pipeline
let library; // one import for all models
let fetched; // whether everything that the load asked for came

// Not every error is an object: WebAssembly throws numbers.
const reason = (error) => String(error?.message ?? error).slice(0, 200).replace(/\.$/, "");

// Where the library finds the models and its own runtime, of which `report` gets the bytes as they come.
function prepare({ env }, isClone, report) {
  if (isClone) { // models that are made anew are loaded anew
    Object.assign(env, { allowLocalModels: true, allowRemoteModels: false, localModelPath: "/weights/", useBrowserCache: false });
  }
  const paths = env.backends.onnx.wasm.wasmPaths;
  for (const kind of ["mjs", "wasm"]) {
    paths[kind] = paths[kind].replace(".asyncify", ""); // the build without WebGPU is half as large
    if (isClone) paths[kind] = paths[kind].replace(/^https:.*\/dist/, `${self.location.origin}/node_modules/onnxruntime-web/dist`);
  }
  env.fetch = async (url, options) => {
    const response = await fetch(url, options).catch((error) => { fetched = false; throw error; });
    fetched &&= response.ok;
    if (!String(url).endsWith(".wasm") || !response.ok) return response;
    let bytes = 0;
    const count = new TransformStream({
      transform(chunk, stream) { report("ONNX Runtime", bytes += chunk.length); stream.enqueue(chunk); } });
    return new Response(response.body.pipeThrough(count), response);
  };
}

async function load({ model, dtype, address, isClone }, report) {
  fetched = false;
  report("the library");
  library ??= import(address);
  const found = await library.catch((error) => { library = undefined; throw Object.assign(new Error(reason(error)), { ofLibrary: true }); });
  fetched = true;
  prepare(found, isClone, report);
  report();
  let size;
  const progress_callback = ({ status, file, loaded, total }) => {
    if (status !== "progress") return;
    if (file.endsWith(".onnx")) size = total;
    report(undefined, file.endsWith(".onnx") ? loaded : undefined, size);
  };
  const by = (type) => found.pipeline("text-classification", model, { dtype: type, device: "wasm", progress_callback });
  const classify = opened.get(model) ?? await by(dtype ?? "q8").catch((error) => {
    // another's repository that holds the float model alone is opened as it is
    if (error?.name !== "ModelFileNotFoundError" || dtype) throw error;
    fetched = true;
    return by("fp32");
  });
  opened.set(model, classify);
  return { size, labels: Object.values(classify.model.config.id2label) };
}

// The scores of a text, the time that they took, and the number of tokens that are read where the text has more.
async function classify({ model, text }) {
  const answer = opened.get(model), start = performance.now();
  const scores = await answer(text, { top_k: null });
  const milliseconds = performance.now() - start, limit = answer.tokenizer?.model_max_length;
  if (!scores.length || !scores.every(({ score }) => Number.isFinite(score))) throw new Error("it gives no probabilities");
  return { scores, milliseconds, readTokens: answer.tokenizer?.encode(text).length > limit ? limit : undefined };
}

self.onmessage = async ({ data: { id, act, ...rest } }) => {
  const report = (stage, bytes, total) => self.postMessage({ id, stage: stage ?? "", bytes, total });
  try {
    self.postMessage({ id, done: await (act === "load" ? load(rest, report) : classify(rest)) });
  } catch (error) {
    self.postMessage({ id, failed: reason(error), ofLibrary: error?.ofLibrary, damaged: fetched });
  }
};
