// Asks the model in a folder; transformers.js does all of it but reading and writing JSON.
//
//   node ask.mjs FOLDER < questions.json > answers.json
//
// A question: {texts, image, tokens, again}; one text beside an image, any number without, padded to
// one length; again: a second turn, fed with the cache of the first. An answer: what the processor
// made, the new tokens, and what the guard's outputs said at the last token of each call.

import { readFileSync } from 'node:fs';
import { argv, stdout } from 'node:process';
import {
    AutoModelForImageTextToText,
    AutoProcessor,
    RawImage,
    Tensor,
    cat,
    env,
    ones,
} from '@huggingface/transformers';

env.allowRemoteModels = false;
const folder = argv[2];
const processor = await AutoProcessor.from_pretrained(folder);
const model = await AutoModelForImageTextToText.from_pretrained(folder);

const last = (rows) => rows.map((row) => Number(row.at(-1)));
let said = [];
const forward = model.forward.bind(model);
model.forward = async (inputs) => {
    const outputs = await forward(inputs);
    if (outputs.guard_score) {
        said.push([last(outputs.guard_score.tolist()), last(outputs.guard_open.tolist())]);
    }
    return outputs;
};

function prompt(text, image) {
    const content = [{ type: 'text', text }];
    if (image) content.unshift({ type: 'image' });
    const options = { add_generation_prompt: true };
    return processor.apply_chat_template([{ role: 'user', content }], options);
}

async function processed({ texts, image }) {
    const prompts = texts.map((text) => prompt(text, image));
    const options = { add_special_tokens: false, padding: true }; // the template has them
    if (!image) return processor.tokenizer(prompts, options);
    const picture = await RawImage.read(image);
    if (model.config.model_type === 'llava') return processor(picture, prompts, options);
    return processor(prompts, picture);
}

async function answered(inputs, tokens, cache) {
    said = [];
    const settings = { max_new_tokens: tokens, return_dict_in_generate: true };
    const given = cache ? { ...inputs, past_key_values: cache } : inputs;
    const { sequences, past_key_values } = await model.generate({ ...given, ...settings });
    const length = inputs.input_ids.dims[1];
    const answer = { tokens: sequences.slice(null, [length, null]).tolist(), said };
    return { answer, sequences, past_key_values };
}

const plain = (tensor) => tensor.tolist().flat().map(Number);
const answers = [];
for (const question of JSON.parse(readFileSync(0, 'utf8'))) {
    const inputs = await processed(question);
    const first = await answered(inputs, question.tokens);
    const answer = {
        ...first.answer,
        length: inputs.input_ids.dims[1],
        input_ids: plain(inputs.input_ids),
        attention_mask: plain(inputs.attention_mask),
        pixels: inputs.pixel_values ? Array.from(inputs.pixel_values.data) : null,
    };
    if (question.again) {
        const more = new Tensor('int64', question.again.map(BigInt), [1, question.again.length]);
        const input_ids = cat([first.sequences, more], 1);
        const turn = { input_ids, attention_mask: ones(input_ids.dims) };
        answer.second = (await answered(turn, question.tokens, first.past_key_values)).answer;
    }
    answers.push(answer);
}
stdout.write(JSON.stringify(answers, (_, value) => (typeof value === 'bigint' ? Number(value) : value)));
