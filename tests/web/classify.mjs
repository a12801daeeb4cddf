// node --import ./setup.mjs classify.mjs REPOSITORY DTYPE [BATCH] < texts.json: the ranking of each text, as JSON.
import { text } from "node:stream/consumers";
import { pipeline } from "@huggingface/transformers";

const [repository, dtype, batch = "1"] = process.argv.slice(2);
const classify = await pipeline("text-classification", repository, { dtype });
const texts = JSON.parse(await text(process.stdin));
const answers = [];
for (let start = 0; start < texts.length; start += Number(batch)) {
  answers.push(...(await classify(texts.slice(start, start + Number(batch)), { top_k: null })));
}
console.log(JSON.stringify(answers));
