// node browse.mjs CHROMIUM PLACE SCREENSHOT: uses the demo page as a person does, by keyboard alone; for PLACE see
// page.mjs. Prints what was seen, as JSON.
import { openBrowser, openPage } from "./page.mjs";

const [executablePath, place, screenshot] = process.argv.slice(2);
const browser = await openBrowser(executablePath);
const { page, traffic, address } = await openPage(browser, place);
page.setDefaultTimeout(90_000);

async function look(condition, argument) {
  await page.waitForFunction(condition, argument);
  const bars = await page.locator("#bars li").evaluateAll((rows) => rows.map((row) => ({
    label: row.firstChild.textContent, shown: row.lastChild.textContent, score: Number(row.dataset.score),
    width: row.querySelector(".fill").style.width, best: row.className === "best" })));
  return { text: await page.inputValue("#text"), status: await page.textContent("#status"), bars };
}

const answered = (text) => document.getElementById("bars").dataset.text === text;
const loaded = () => / in \d+ ms, loaded in /.test(document.getElementById("status").textContent);
const lines = (selector) => page.locator(selector).evaluateAll((all) => all.map((one) => one.innerText));
await page.goto(address);
const watch = (id) => page.evaluateHandle((name) => { // all that stands in an element, one after the other
  const seen = [], element = document.getElementById(name);
  new MutationObserver(() => seen.push(element.textContent)).observe(element, { childList: true });
  return seen;
}, id);
const amounts = await watch("amount"), said = await watch("said"); // beside the bar while it loads; what is read out
const seen = { first: await look(loaded), bytes: traffic.bytes };
[seen.amounts, seen.said] = [await amounts.jsonValue(), await said.jsonValue()];
seen.forms = await lines("#forms label:not([hidden])");
seen.missing = await lines("#missing li:not(:empty)");
seen.classes = await page.textContent("#classes");

const type = async (text) => {
  await page.keyboard.press("Control+A");
  await page.keyboard.type(text);
};
const DARK = "i am scared of the dark";
await type(DARK);
seen.typed = await look(answered, DARK);
seen.saidLater = (await said.jsonValue()).slice(seen.said.length);
seen.address = page.url();

// The other models, with the arrows: each answers the text that stands there.
await page.keyboard.press("Shift+Tab");
const chosen = () => page.inputValue("#forms :checked");
seen.others = {};
for (let name = await chosen(); name !== "INT2"; seen.others[name] = await look(loaded)) {
  await page.keyboard.press("ArrowLeft");
  name = await chosen();
}
seen.tried = await lines("#tried tbody tr");
seen.wide = await page.evaluate(() => document.scrollingElement.scrollWidth);
await page.screenshot({ path: screenshot, fullPage: true });
await page.keyboard.press("ArrowLeft"); // back to the first, which is open
seen.again = await look(() => document.querySelector("#forms :checked").value === "INT4" && document.querySelector("#bars li"));

await page.keyboard.press("Tab");
await page.keyboard.press("Tab"); // the first example
await page.keyboard.press("Enter");
seen.example = await look(answered, "i miss my old home");
seen.triedLater = await lines("#tried tbody tr");

await page.fill("#text", "so ".repeat(200).trim());
await page.waitForFunction(() => !document.getElementById("cut").hidden);
seen.cut = await page.textContent("#cut");
await page.focus("#text");
await page.keyboard.press("Control+A");
await page.keyboard.press("Delete");
seen.empty = await look(() => document.getElementById("status").textContent === "Type a text");

if (await page.isVisible("#other")) { // not in a clone
  for (let tabs = 0; tabs < 4; tabs += 1) await page.keyboard.press("Tab"); // past the examples, to the model
  await page.keyboard.press("Enter");
  await page.keyboard.press("Tab");
  await type("user/nowhere");
  await page.keyboard.press("Enter");
  seen.nowhere = await look(() => document.getElementById("status").textContent.includes("cannot be loaded"));
}
await page.goto("about:blank");
await page.goto(seen.address); // as someone who got the link
seen.linked = await look(answered, DARK);
console.log(JSON.stringify({ ...seen, refused: traffic.refused }));
await page.unrouteAll({ behavior: "ignoreErrors" });
await browser.close();
