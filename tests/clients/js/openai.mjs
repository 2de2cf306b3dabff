// The `openai` package for JavaScript. Each line that is printed is a check that held.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { BASE_URL, EMBED_MODEL, MODEL, check, gathered, messages } from "./common.mjs";

const openai = new OpenAI({ baseURL: `${BASE_URL}/v1`, apiKey: "any", maxRetries: 0 });
const short = { model: MODEL, messages, max_tokens: 8, temperature: 0 };
const parameters = {
  type: "object",
  properties: { city: { type: "string", enum: ["Boston"] } },
  required: ["city"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "get_weather", parameters } }];
const named = { type: "function", function: { name: "get_weather" } };

await check("models", async () => {
  const found = await gathered(openai.models.list());
  assert(found.some((one) => one.id === MODEL));
  assert.equal((await openai.models.retrieve(MODEL)).id, MODEL);
});
await check("chat", async () => {
  const reply = await openai.chat.completions.create(short);
  assert(reply.choices[0].message.content);
  assert(reply.usage.completion_tokens <= 8);
});
await check("chat as a stream", async () => {
  const stream_options = { include_usage: true };
  const chunks = await gathered(await openai.chat.completions.create({ ...short, stream: true, stream_options }));
  assert.equal(chunks[0].choices[0].delta.role, "assistant");
  assert.deepEqual(chunks.at(-1).choices, []);
  assert(chunks.at(-1).usage.total_tokens > 0);
});
await check("the stream helper", async () => {
  const stream = openai.chat.completions.stream(short);
  assert(await stream.finalContent());
  assert((await stream.totalUsage()) !== undefined);
});
await check("a stream that is aborted", async () => {
  const stream = await openai.chat.completions.create({ ...short, max_tokens: 400, stream: true });
  for await (const _ of stream) {
    stream.controller.abort();
    break;
  }
  assert((await openai.chat.completions.create(short)).choices.length === 1);
});
await check("a forced tool call", async () => {
  const asked = { ...short, max_tokens: 200, tools, tool_choice: named };
  const [call] = (await openai.chat.completions.create(asked)).choices[0].message.tool_calls;
  assert.deepEqual(JSON.parse(call.function.arguments), { city: "Boston" });
  const streamed = await openai.chat.completions.stream(asked).finalMessage();
  assert.deepEqual(JSON.parse(streamed.tool_calls[0].function.arguments), { city: "Boston" });
  assert.equal(streamed.tool_calls[0].function.name, "get_weather");
});
await check("a schema", async () => {
  const response_format = { type: "json_schema", json_schema: { name: "city", strict: true, schema: parameters } };
  const reply = await openai.chat.completions.parse({ ...short, max_tokens: 200, response_format });
  assert.equal(JSON.parse(reply.choices[0].message.content).city, "Boston");
});
await check("completions", async () => {
  const reply = await openai.completions.create({ model: MODEL, prompt: ["A, B,", "One, two,"], max_tokens: 4 });
  assert.equal(reply.choices.length, 2);
});
await check("embeddings", async () => {
  const packed = await openai.embeddings.create({ model: EMBED_MODEL, input: ["x", "y"] });
  const plain = await openai.embeddings.create({ model: EMBED_MODEL, input: ["x", "y"], encoding_format: "float" });
  assert.equal(packed.data.length, 2);
  assert(Math.abs(packed.data[1].embedding[0] - plain.data[1].embedding[0]) < 1e-5);
});
await check("responses", async () => {
  const asked = { model: MODEL, input: "Say hello.", max_output_tokens: 16 };
  assert((await openai.responses.create(asked)).output_text);
  const events = await gathered(await openai.responses.create({ ...asked, stream: true }));
  assert.deepEqual(events.map((event) => event.sequence_number), [...events.keys()]);
  assert.match(events.at(-1).type, /^response\.(completed|incomplete)$/);
});
await check("errors", async () => {
  const missing = openai.chat.completions.create({ ...short, model: "never-installed" });
  await assert.rejects(missing, (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found");
  const wrong = openai.chat.completions.create({ ...short, temperature: -5 });
  await assert.rejects(wrong, (error) => error instanceof OpenAI.BadRequestError);
});
