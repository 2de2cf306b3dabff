// The `ollama` package for JavaScript. Each line that is printed is a check that held.
import assert from "node:assert/strict";
import { Ollama } from "ollama";
import { BASE_URL, EMBED_MODEL, MODEL, check, gathered, messages } from "./common.mjs";

const ollama = new Ollama({ host: BASE_URL });
const options = { num_predict: 8, temperature: 0 };

await check("list", async () => {
  const { models } = await ollama.list();
  assert(models.some((one) => one.name === MODEL && one.digest.length === 64));
});
await check("show", async () => {
  const shown = await ollama.show({ model: MODEL });
  assert(shown.capabilities.includes("completion"));
  assert(shown.model_info["general.architecture"]);
});
await check("chat", async () => {
  const reply = await ollama.chat({ model: MODEL, messages, options });
  assert(reply.message.content);
  assert.equal(reply.done, true);
  assert(reply.eval_count <= 8);
});
await check("chat as a stream", async () => {
  const pieces = await gathered(await ollama.chat({ model: MODEL, messages, options, stream: true }));
  assert(pieces.map((piece) => piece.message.content).join(""));
  assert.deepEqual(pieces.map((piece) => piece.done), pieces.map((_, index) => index === pieces.length - 1));
});
await check("a stream that is aborted", async () => {
  const stream = await ollama.chat({ model: MODEL, messages, stream: true, options: { num_predict: 400 } });
  await assert.rejects(async () => {
    for await (const _ of stream) stream.abort();
  }, /abort/i);
});
await check("format", async () => {
  const format = { type: "object", properties: { city: { enum: ["Paris", "Rome"] } }, required: ["city"] };
  const reply = await ollama.chat({ model: MODEL, messages, format });
  assert(["Paris", "Rome"].includes(JSON.parse(reply.message.content).city));
});
await check("generate", async () => {
  assert((await ollama.generate({ model: MODEL, prompt: "Hi", options })).response);
  const pieces = await gathered(await ollama.generate({ model: MODEL, prompt: "Hi", options, stream: true }));
  assert(pieces.at(-1).context.length > 0);
});
await check("embed", async () => {
  assert.equal((await ollama.embed({ model: EMBED_MODEL, input: ["x", "y"] })).embeddings.length, 2);
  assert((await ollama.embeddings({ model: EMBED_MODEL, prompt: "x" })).embedding.length > 0);
});
await check("ps", async () => {
  const { models } = await ollama.ps();
  assert(models.every((one) => !Number.isNaN(Date.parse(one.expires_at))));
});
await check("pull", async () => {
  assert.equal((await ollama.pull({ model: MODEL })).status, "success");
  const pieces = await gathered(await ollama.pull({ model: MODEL, stream: true }));
  assert.equal(pieces.at(-1).status, "success");
});
await check("copy, create, delete", async () => {
  await ollama.copy({ source: MODEL, destination: "clients-js" });
  await ollama.delete({ model: "clients-js" });
  assert.equal((await ollama.create({ model: "clients-js", from: MODEL, system: "Be short." })).status, "success");
  await ollama.delete({ model: "clients-js" });
});
await check("errors", async () => {
  const missing = { model: "never-installed", messages };
  await assert.rejects(ollama.chat(missing), { name: "ResponseError", status_code: 404 });
  await assert.rejects(ollama.chat({ ...missing, stream: true }), { status_code: 404 });
  await assert.rejects(async () => gathered(await ollama.pull({ model: "never-installed", stream: true })));
});
await check("version", async () => {
  assert.match((await ollama.version()).version, /^\d+\.\d+\.\d+$/);
});
