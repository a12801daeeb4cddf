// node faults.mjs CHROMIUM PLACE [FAULT ...]: what the demo page says when something fails; for PLACE see page.mjs. Prints,
// as JSON, for each fault the status, which bars are shown, which models were opened and which are not there.
import { CDN, HUB, openBrowser, openPage } from "./page.mjs";

const [executablePath, place, ...chosen] = process.argv.slice(2);
const browser = await openBrowser(executablePath);

// A library whose pipelines answer as `answer` does; the names of the models that it opened are kept.
const library = (answer, open = "") => `
  export const env = { backends: { onnx: { wasm: { wasmPaths: { mjs: "", wasm: "" } } } } };
  export const pipeline = async (task, name, options) => {
    (self.opened ??= []).push(name);
    ${open}
    return Object.assign(async () => { ${answer} },
                         { model: { config: { id2label: { 0: "joy", 1: "fear" } } } });
  };`;
const script = (body) => ({ body, contentType: "text/javascript", headers: { "Access-Control-Allow-Origin": "*" } });
const serve = (...words) => (page) => page.route(CDN, (route) => route.fulfill(script(library(...words))));
const GOOD = 'return [{ label: "joy", score: 0.75 }, { label: "fear", score: 0.25 }];';
const hub = (action) => (page) => page.route(HUB, action);

// The clock runs ahead only where a fault needs it: the library itself waits for timers.
const late = (page) => page.addInitScript(() => {
  const wait = window.setTimeout;
  window.setTimeout = (call, delay, ...words) => wait(call, delay / 100, ...words);
});

const workerOf = async (page) => page.workers()[0] ?? page.waitForEvent("worker"); // which may be starting

const FAULTS = {
  noModels: { prepare: () => {}, act: (page) => page.locator("#missing li:not(:empty)").nth(3).waitFor() },
  damaged: { prepare: () => {} }, // by what the place holds
  libraryRefused: { prepare: (page) => page.route(CDN, (route) => route.abort()) },
  libraryIsHtml: { prepare: (page) => page.route(CDN, (route) => route.fulfill({ body: "<html>", contentType: "text/html" })) },
  libraryIsBroken: { prepare: (page) => page.route(CDN, (route) => route.fulfill(script("export const pipeline ="))) },
  libraryNeverComes: { prepare: async (page) => { await late(page); await page.route(CDN, () => {}); } },
  modelRefused: { prepare: hub((route) => route.abort()) },
  modelFails: { prepare: hub((route) => route.fulfill({ status: 500 })) },
  modelIsHtml: { prepare: hub((route) => route.fulfill({ body: "<html>Sign in</html>", contentType: "text/html" })) },
  modelNeverComes: { prepare: async (page) => { await late(page); await serve(GOOD, "await new Promise(() => {});")(page); } },
  answerFails: { prepare: serve('throw new Error("out of memory");') },
  answerThrowsNumber: { prepare: serve("throw 7340032;") },
  answerIsNaN: { prepare: serve('return [{ label: "joy", score: NaN }];') },
  answerIsEmpty: { prepare: serve("return [];") },
  linkNamesAnother: { prepare: serve(GOOD), query: "?model=someone/else" },
  linkNamesPath: { prepare: serve(GOOD), query: "?model=../.." },
  linkNamesMarkup: { prepare: serve(GOOD), query: "?model=<img src=x>" },
  linkNamesSame: { prepare: serve(GOOD), query: "?model=user/bert-emotion-qat-int4" },
  linkNamesSibling: { prepare: serve(GOOD), query: "?model=user/bert-emotion-qat-int2" },
  personOpensAnother: {
    prepare: serve(GOOD), query: "?model=someone/else", act: (page) => page.click("#choose button") },
  // The first model comes after the second, which is the one that was asked for last.
  slowFirst: {
    prepare: serve("return [{ label: name, score: 1 }];",
                   'if (name !== "user/second") await new Promise((done) => { self.release = done; });'),
    act: async (page) => {
      const worker = await workerOf(page);
      while (!(await worker.evaluate(() => self.opened))) await page.waitForTimeout(20);
      await page.click("summary");
      await page.fill("#model", "user/second");
      await page.click("#choose button");
      await page.waitForFunction(() => document.querySelector("#bars li"));
      await worker.evaluate(() => self.release());
    } },
};

const seen = {};
for (const [name, { prepare, query = "", act }] of Object.entries(FAULTS)) {
  if (chosen.length && !chosen.includes(name)) continue;
  const { page, address } = await openPage(browser, place);
  page.setDefaultTimeout(20_000);
  await prepare(page);
  await page.goto(address + query);
  if (act) await act(page);
  await page.waitForFunction(() => !/^$|^Loading/.test(document.getElementById("status").textContent));
  seen[name] = await page.evaluate(() => ({
    status: document.getElementById("status").textContent,
    bars: [...document.querySelectorAll("#bars li")].map((row) => row.firstChild.textContent),
    missing: [...document.querySelectorAll("#missing li:not(:empty)")].map((line) => line.textContent),
    images: document.images.length, wide: document.scrollingElement.scrollWidth }));
  seen[name].opened = await (await workerOf(page)).evaluate(() => self.opened ?? []);
  await page.unrouteAll({ behavior: "ignoreErrors" }); // sizes may still be asked for
  await page.context().close();
}
console.log(JSON.stringify(seen));
await browser.close();
