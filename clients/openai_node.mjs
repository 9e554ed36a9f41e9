// OpenAI's package for Node: whole answers, streams, errors, log-probabilities, tools.
import assert from "node:assert/strict";
import OpenAI from "openai";

const apiKey = process.env.API_KEY;
const client = new OpenAI({ baseURL: `${process.env.BASE_URL}/v1`, apiKey, maxRetries: 0 });
const tools = new OpenAI({ baseURL: `${process.env.TOOLS_URL}/v1`, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "hi" }];

const whole = await client.completions.create({ model: "tiny", prompt: "San Francisco is a", max_tokens: 7, temperature: 0, logprobs: 1 });
assert.equal(whole.usage.completion_tokens, 7);
assert.equal(whole.choices[0].logprobs.tokens.length, 7);
let text = "";
for await (const chunk of await client.completions.create({ model: "tiny", prompt: "San Francisco is a", max_tokens: 7, temperature: 0, stream: true }))
  text += chunk.choices[0].text;
assert.equal(text, whole.choices[0].text);

const chat = await client.chat.completions.create({ model: "tiny", messages, max_completion_tokens: 8, temperature: 0, logprobs: true, top_logprobs: 2 });
assert.equal(chat.choices[0].logprobs.content.length, 8);
const stream = client.chat.completions.stream({ model: "tiny", messages, max_completion_tokens: 8, temperature: 0 });
assert.equal(await stream.finalContent(), chat.choices[0].message.content);

const leaving = await client.completions.create({ model: "tiny", prompt: "a", max_tokens: 100, stream: true });
leaving.controller.abort();

await assert.rejects(client.completions.create({ model: "tiny", prompt: "a", temperature: -1 }), (error) => {
  return error instanceof OpenAI.BadRequestError && error.param === "temperature";
});
await assert.rejects(client.completions.create({ model: "gpt-4", prompt: "a" }), OpenAI.NotFoundError);
await assert.rejects(new OpenAI({ baseURL: client.baseURL, apiKey: "wrong" }).models.list(), OpenAI.AuthenticationError);

const weather = { type: "function", function: { name: "weather", parameters: { type: "object", properties: { city: { type: "string" } } } } };
const called = await tools.chat.completions.create({ model: "tiny", messages, tools: [weather] });
assert.deepEqual(JSON.parse(called.choices[0].message.tool_calls[0].function.arguments), { city: "Oslo" });
const streamed = await tools.chat.completions.stream({ model: "tiny", messages, tools: [weather] }).finalChatCompletion();
assert.equal(streamed.choices[0].message.tool_calls[0].function.name, "weather");
assert.equal(streamed.choices[0].finish_reason, "tool_calls");
console.log("ok");
