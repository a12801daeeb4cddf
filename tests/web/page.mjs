// The demo page in a browser, taken as it stands: what it wants of the CDN comes from node_modules, what it wants of the
// Hub from HF_ENDPOINT, and everything else is refused.
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { chromium } from "playwright-core";

export const CDN = "https://cdn.jsdelivr.net/**", HUB = "https://huggingface.co/**";
const TYPES = { js: "text/javascript", mjs: "text/javascript", wasm: "application/wasm", html: "text/html" };

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

export const openBrowser = (executablePath) => chromium.launch({ executablePath, args: ["--no-sandbox"] });

export async function openPage(browser, folder) {
  const context = await browser.newContext({ viewport: { width: 360, height: 740 }, deviceScaleFactor: 2 });
  const page = await context.newPage();
  const refused = [];
  await page.route("**", (route) => { refused.push(route.request().url()); return route.abort(); });
  await page.route(CDN, fromCdn);
  await page.route(HUB, fromHub);
  await page.route("https://demo.page/**", async (route) =>
    route.fulfill({ body: await readFile(join(folder, "index.html")), contentType: TYPES.html }));
  return { page, refused };
}
