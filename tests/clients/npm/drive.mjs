// OpenAI's SDK for node and the Vercel AI SDK against a running server.
//
//     node drive.mjs BASE_URL MODEL        (from a folder with node_modules)
//
// Prints a line per check as run_checks.py does; exit code 1 if any failed.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// The packages lie in the environment's folder, which is where this was started.
const require = createRequire(`${process.cwd()}/`);
const load = (name) => import(pathToFileURL(require.resolve(name)).href);
const { default: OpenAI } = await load("openai");
const { zodResponseFormat } = await load("openai/helpers/zod");
const { z } = await load("zod");
const { generateText, streamText, Output, tool } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");

const [url, model] = process.argv.slice(2);
const sdk = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0, timeout: 300_000 });
const provider = createOpenAICompatible({
  name: "baton",
  baseURL: url,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const question = "Write one sentence about the sea.";
const messages = [{ role: "user", content: question }];
const numTokens = 16;
const asked = { model, messages, temperature: 0, max_tokens: numTokens };
const Verdict = z.object({ fits: z.boolean(), level: z.enum(["junior", "senior"]) });
const inputSchema = z.object({ city: z.string().max(20), remote: z.boolean() });
const common = { model: provider(model), prompt: question, temperature: 0, maxRetries: 0 };

const checks = {
  async "openai: chat, whole and streamed, token by token"() {
    const whole = await sdk.chat.completions.create(asked);
    const stream = await sdk.chat.completions.create({
      ...asked,
      stream: true,
      stream_options: { include_usage: true },
    });
    const pieces = [];
    let usage = null;
    for await (const chunk of stream) {
      if (chunk.choices[0]?.delta?.content) pieces.push(chunk.choices[0].delta.content);
      usage = chunk.usage ?? usage;
    }
    assert.equal(pieces.join(""), whole.choices[0].message.content);
    assert.equal(pieces.length, numTokens);
    assert.equal(usage.completion_tokens, numTokens);
  },

  async "openai: the stream helper gathers what came"() {
    const runner = sdk.chat.completions.stream(asked);
    let seen = "";
    runner.on("content", (delta) => (seen += delta));
    const final = await runner.finalChatCompletion();
    assert.equal(seen, final.choices[0].message.content);
  },

  async "openai: an answer is parsed by its zod schema"() {
    const found = await sdk.chat.completions.parse({
      ...asked,
      max_tokens: 100,
      response_format: zodResponseFormat(Verdict, "verdict"),
    });
    Verdict.parse(found.choices[0].message.parsed);
  },

  async "openai: a forced call has arguments that parse"() {
    const parameters = z.toJSONSchema(inputSchema);
    const found = await sdk.chat.completions.create({
      ...asked,
      max_tokens: 100,
      tools: [{ type: "function", function: { name: "search_jobs", parameters } }],
      tool_choice: { type: "function", function: { name: "search_jobs" } },
    });
    const [call] = found.choices[0].message.tool_calls;
    assert.equal(call.function.name, "search_jobs");
    inputSchema.parse(JSON.parse(call.function.arguments));
  },

  async "openai: completions, responses and models"() {
    const text = await sdk.completions.create({ model, prompt: "The sea is", max_tokens: 8, temperature: 0 });
    assert.ok(text.choices[0].text.trim());
    const whole = await sdk.responses.create({ model, input: question, max_output_tokens: numTokens, temperature: 0 });
    let streamed = "";
    const stream = await sdk.responses.create({
      model,
      input: question,
      max_output_tokens: numTokens,
      temperature: 0,
      stream: true,
    });
    for await (const event of stream) if (event.type === "response.output_text.delta") streamed += event.delta;
    assert.ok(whole.output_text.trim());
    assert.equal(streamed, whole.output_text);
    const names = [];
    for await (const card of sdk.models.list()) names.push(card.id);
    assert.ok(names.includes(model));
  },

  async "openai: a model that is not served is its NotFoundError"() {
    await assert.rejects(sdk.chat.completions.create({ ...asked, model: "nobody" }), OpenAI.NotFoundError);
  },

  async "openai: abort closes the request"() {
    const stream = await sdk.chat.completions.create({ ...asked, max_tokens: 4000, stream: true, ignore_eos: true });
    let seen = 0;
    for await (const _ of stream) if (++seen === 3) break; // leaving the loop aborts
    return 1;
  },

  async "ai: generateText and streamText say the same, token by token"() {
    const whole = await generateText({ ...common, maxOutputTokens: numTokens });
    const stream = streamText({ ...common, maxOutputTokens: numTokens });
    const pieces = [];
    for await (const piece of stream.textStream) pieces.push(piece);
    assert.equal(pieces.join(""), whole.text);
    assert.equal(pieces.length, numTokens);
    assert.equal(await stream.finishReason, "length");
    assert.equal((await stream.usage).outputTokens, numTokens);
  },

  async "ai: an object by its schema, whole and growing"() {
    const output = Output.object({ schema: Verdict });
    Verdict.parse((await generateText({ ...common, maxOutputTokens: 100, output })).output);
    const stream = streamText({ ...common, maxOutputTokens: 100, output });
    const grown = [];
    for await (const partial of stream.partialOutputStream) grown.push(partial);
    Verdict.parse(grown.at(-1));
  },

  async "ai: a forced call, whole and streamed"() {
    const tools = { search_jobs: tool({ description: "Search jobs", inputSchema }) };
    const forced = { ...common, maxOutputTokens: 100, tools, toolChoice: { type: "tool", toolName: "search_jobs" } };
    const [call] = (await generateText(forced)).toolCalls;
    inputSchema.parse(call.input);
    const [streamed] = await streamText(forced).toolCalls;
    assert.deepEqual(streamed.input, call.input);
    const required = await generateText({ ...forced, toolChoice: "required" });
    inputSchema.parse(required.toolCalls[0].input);
  },

  async "ai: abortSignal closes the request"() {
    const controller = new AbortController();
    const stream = streamText({
      ...common,
      maxOutputTokens: 4000,
      abortSignal: controller.signal,
      providerOptions: { baton: { ignore_eos: true } },
      onError() {},
    });
    let seen = 0;
    for await (const _ of stream.textStream) if (++seen === 3) controller.abort();
    assert.ok(seen < 4000);
    return 1;
  },
};

let failed = 0;
let aborted = 0;
for (const [name, check] of Object.entries(checks)) {
  const started = performance.now();
  try {
    aborted += (await check()) ?? 0;
    console.log(`ok ${name} ${((performance.now() - started) / 1000).toFixed(1)} s`);
  } catch (error) {
    failed += 1;
    console.log(`failed ${name}\n${error.stack ?? error}`);
  }
}
console.log(`aborted ${aborted}`);
process.exit(failed ? 1 : 0);
