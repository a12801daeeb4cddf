// node latency.mjs FOLDER NAME THREADS < texts.json: how long a pipeline of the local model FOLDER/NAME takes from each
// text to its label, in milliseconds, as JSON.
import { text } from "node:stream/consumers";
import { env, pipeline } from "@huggingface/transformers";

const [folder, name, threads] = process.argv.slice(2);
env.localModelPath = folder;
env.allowRemoteModels = false;
const options = { dtype: "q8", session_options: { intraOpNumThreads: Number(threads) } };
const classify = await pipeline("text-classification", name, options);
const times = [];
for (const one of JSON.parse(await text(process.stdin))) {
  const start = performance.now();
  await classify(one);
  times.push(performance.now() - start);
}
console.log(JSON.stringify({ times, node: process.version, transformers: env.version }));
