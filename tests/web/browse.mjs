// node browse.mjs CHROMIUM PAGE_FOLDER REPOSITORY SCREENSHOT: uses the demo page as a person does, by keyboard alone.
// The page is taken as it stands: what it wants of the CDN comes from node_modules, what it wants of the Hub from
// HF_ENDPOINT, and everything else is refused. Prints what was seen, as JSON.
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { chromium } from "playwright-core";

const [executablePath, folder, repository, screenshot] = process.argv.slice(2);
const TYPES = { js: "text/javascript", mjs: "text/javascript", wasm: "application/wasm", html: "text/html" };
const refused = [];

async function fromCdn(route) {
  const [, name, version, file] = route.request().url().match(/\/npm\/((?:@[^/]+\/)?[^@/]+)@([^/]+)(\/.+)?$/);
  const about = JSON.parse(await readFile(join("node_modules", name, "package.json")));
  if (about.version !== version) throw new Error(`the page wants ${name} ${version}, installed is ${about.version}`);
  const path = join("node_modules", name, file ?? about.jsdelivr);
  await route.fulfill({ body: await readFile(path), contentType: TYPES[path.split(".").pop()],
                        headers: { "Access-Control-Allow-Origin": "*" } });
}

async function fromHub(route) {
  const url = route.request().url().replace("https://huggingface.co", process.env.HF_ENDPOINT);
  await route.fulfill({ response: await route.fetch({ url }) });
}

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const page = await browser.newPage({ viewport: { width: 360, height: 740 }, deviceScaleFactor: 2 });
page.setDefaultTimeout(90_000);
await page.route("**", (route) => { refused.push(route.request().url()); return route.abort(); });
await page.route("https://cdn.jsdelivr.net/**", fromCdn);
await page.route("https://huggingface.co/**", fromHub);
await page.route("https://demo.page/**", async (route) =>
  route.fulfill({ body: await readFile(join(folder, "index.html")), contentType: TYPES.html }));

async function look(condition) {
  await page.waitForFunction(condition);
  const bars = await page.locator("#bars li").evaluateAll((rows) => rows.map((row) => ({
    label: row.firstChild.textContent, shown: row.lastChild.textContent, score: Number(row.dataset.score),
    width: row.querySelector(".fill").style.width, best: row.className === "best" })));
  return { text: await page.inputValue("#text"), status: await page.textContent("#status"), bars };
}

const answered = (text) => `document.getElementById("bars").dataset.text === ${JSON.stringify(text)}`;
await page.goto(`https://demo.page/?model=${repository}`);
const seen = { first: await look(() => / in \d+ ms, loaded/.test(document.getElementById("status").textContent)) };

const type = async (text) => {
  await page.keyboard.press("Control+A");
  await page.keyboard.type(text);
};
await type("i am scared of the dark");
seen.typed = await look(answered("i am scared of the dark"));
seen.wide = await page.evaluate(() => document.scrollingElement.scrollWidth);
await page.screenshot({ path: screenshot });

await page.keyboard.press("Tab"); // the first example
await page.keyboard.press("Enter");
seen.example = await look(answered("i miss my old home"));

await page.focus("#text");
await page.keyboard.press("Control+A");
await page.keyboard.press("Delete");
seen.empty = await look(() => document.getElementById("status").textContent === "Type a text");

for (let tabs = 0; tabs < 4; tabs += 1) await page.keyboard.press("Tab"); // past the examples, to the model
await page.keyboard.press("Enter");
await page.keyboard.press("Tab");
await type("user/nowhere");
await page.keyboard.press("Enter");
seen.nowhere = await look(() => document.getElementById("status").textContent.includes("cannot be loaded"));
console.log(JSON.stringify({ ...seen, refused }));
await browser.close();
