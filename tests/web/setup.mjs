// Points transformers.js at the Hub that HF_ENDPOINT names, with a cache of this run's own.
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { env } from "@huggingface/transformers";

env.remoteHost = `${process.env.HF_ENDPOINT}/`;
env.cacheDir = mkdtempSync(join(tmpdir(), "emotion-web-"));
process.on("exit", () => rmSync(env.cacheDir, { recursive: true }));
