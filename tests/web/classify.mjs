// node --import ./setup.mjs classify.mjs REPOSITORY DTYPE < texts.json: the ranking of each text, as JSON.
import { text } from "node:stream/consumers";
import { pipeline } from "@huggingface/transformers";

const [repository, dtype] = process.argv.slice(2);
const classify = await pipeline("text-classification", repository, { dtype });
const answers = [];
for (const one of JSON.parse(await text(process.stdin))) answers.push(await classify(one, { top_k: null }));
console.log(JSON.stringify(answers));
