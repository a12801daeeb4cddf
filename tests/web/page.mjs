// The demo page in a browser, taken as it stands. As published (PLACE is a folder): what it wants of the CDN comes from
// node_modules, what it wants of the Hub from HF_ENDPOINT. As in a clone (PLACE is an address): from its own server.
// Everything else is refused.
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { chromium } from "playwright-core";

export const CDN = "https://cdn.jsdelivr.net/**", HUB = "https://huggingface.co/**";
const TYPES = { js: "text/javascript", mjs: "text/javascript", wasm: "application/wasm", html: "text/html" };

async function fromCdn(url) {
  const [, name, version, file] = url.match(/\/npm\/((?:@[^/]+\/)?[^@/]+)@([^/]+)(\/.+)?$/);
  const about = JSON.parse(await readFile(join("node_modules", name, "package.json")));
  if (about.version !== version) throw new Error(`the page wants ${name} ${version}, installed is ${about.version}`);
  const path = join("node_modules", name, file ?? about.jsdelivr);
  return { body: await readFile(path), contentType: TYPES[path.split(".").pop()],
           headers: { "Access-Control-Allow-Origin": "*" } };
}

async function fromHub(url, route) {
  const response = await route.fetch({ url: url.replace("https://huggingface.co", process.env.HF_ENDPOINT) });
  return { response, body: await response.body() };
}

export const openBrowser = (executablePath) => chromium.launch({ executablePath, args: ["--no-sandbox"] });

export async function openPage(browser, place) {
  const context = await browser.newContext({ viewport: { width: 360, height: 740 }, deviceScaleFactor: 2 });
  const page = await context.newPage();
  const traffic = { bytes: 0, refused: [] }; // bytes of a published page, not compressed: a CDN sends fewer
  const answer = (pattern, find) => page.route(pattern, async (route) => {
    const found = await find(route.request().url(), route);
    traffic.bytes += found.body.length;
    await route.fulfill(found);
  });
  const refuse = (route) => { traffic.refused.push(route.request().url()); return route.abort(); };
  await page.route("**", refuse);
  if (place.startsWith("http:")) {
    await page.route(`${place}**`, (route) => route.continue());
    return { page, traffic, address: place };
  }
  await answer(CDN, fromCdn);
  await answer(HUB, fromHub);
  await answer("https://demo.page/**", async (url) =>
    ({ "/": { body: await readFile(join(place, "index.html")), contentType: TYPES.html },
       "/worker.js": { body: await readFile(join(place, "worker.js")), contentType: TYPES.js } })[new URL(url).pathname]
    ?? { status: 404, body: "" });
  return { page, traffic, address: "https://demo.page/" };
}
