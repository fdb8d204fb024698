"""What reading a prompt costs with a vocabulary of the paper's size: `python tools/tokenising.py`.

The tokenizer is built here: 151 674 entries (InternVL3's number), whole words, InternVL3's chat template. "copying" is
what a prompt costs if the question what kind of tokenizer it is copies the vocabulary every time, "remembered" what it
costs now."""
import argparse
import time
from unittest import mock

import spar.core  # noqa: F401  before transformers
from tokenizers import models, pre_tokenizers, Tokenizer
from transformers import PreTrainedTokenizerFast

from spar.backbones import mllm, words
from spar.backbones.mllm import Chat
from spar.unified.condition import sequence

SPECIAL = ['<pad>', '<bos>', '<eos>', '<|im_start|>', '<|im_end|>', '<img>', '</img>', '<IMG_CONTEXT>']
KNOWN = 'user assistant system Generate Edit an the image a red blue star heart left of make it green . :'.split()
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def large_tokenizer(size: int = 151_674) -> PreTrainedTokenizerFast:
    "A tokenizer with `size` entries that reads InternVL3's chat template."
    names = SPECIAL + KNOWN
    vocab = {name: i for i, name in enumerate([*names, *(f'word{i}' for i in range(size - len(names)))])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token='<pad>'))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token='<pad>', bos_token='<bos>', eos_token='<eos>', padding_side='left',
        additional_special_tokens=SPECIAL[3:], chat_template=TEMPLATE,
    )
    words.check_template(tokenizer, 'tools/tokenising.py')
    return tokenizer


def copying(tokenizer) -> bool:
    "The question `is_word_level` as it was: the whole vocabulary is copied to answer it."
    return '<IMG_CONTEXT>' in tokenizer.get_vocab() and len(tokenizer) < 10_000


def milliseconds(chat: Chat, editing: bool, queries: int, n: int) -> float:
    "Milliseconds a prompt, for batches of n."
    prompts = ['a red star left of a blue heart'] * n
    sequence(chat, prompts[:1], queries, editing)
    began = time.perf_counter()
    sequence(chat, prompts, queries, editing)
    return (time.perf_counter() - began) * 1000 / n


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--size', type=int, default=151_674, help='entries of the vocabulary')
    p.add_argument('--image-tokens', type=int, default=256, help='context tokens of a reference image')
    p.add_argument('--queries', type=int, default=256)
    args = p.parse_args()
    tokenizer = large_tokenizer(args.size)
    ids = tokenizer.convert_tokens_to_ids
    chat = Chat(tokenizer, ids('<IMG_CONTEXT>'), ids('<pad>'), args.image_tokens)
    sizes = f'{args.queries} queries, {args.image_tokens} tokens a reference image'
    print(f'vocabulary of {len(tokenizer)} entries, {sizes}')
    print('| ms a prompt | copying | remembered |\n| --- | ---: | ---: |')
    for task in ('generation', 'editing'):
        edit = task == 'editing'
        with mock.patch.object(words, 'is_word_level', copying), mock.patch.object(mllm, 'is_word_level', copying):
            before = milliseconds(chat, edit, args.queries, 4)
        print(f'| {task} | {before:.1f} | {milliseconds(chat, edit, args.queries, 200):.2f} |')


if __name__ == '__main__': main()
