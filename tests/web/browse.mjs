// node browse.mjs CHROMIUM PAGE_FOLDER SCREENSHOT: uses the demo page as a person does, by keyboard alone.
// Prints what was seen, as JSON.
import { openBrowser, openPage } from "./page.mjs";

const [executablePath, folder, screenshot] = process.argv.slice(2);
const browser = await openBrowser(executablePath);
const { page, refused } = await openPage(browser, folder);
page.setDefaultTimeout(90_000);

async function look(condition) {
  await page.waitForFunction(condition);
  const bars = await page.locator("#bars li").evaluateAll((rows) => rows.map((row) => ({
    label: row.firstChild.textContent, shown: row.lastChild.textContent, score: Number(row.dataset.score),
    width: row.querySelector(".fill").style.width, best: row.className === "best" })));
  return { text: await page.inputValue("#text"), status: await page.textContent("#status"), bars };
}

const answered = (text) => `document.getElementById("bars").dataset.text === ${JSON.stringify(text)}`;
await page.goto("https://demo.page/");
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
