"""
What Hugging Face's libraries read: the tokenizer as tokenizer.json, with the two parts that each token was made of.
A part of tokenizer.py (--export). Ids and text are those of ours, but for two things: a text that spells a special
token makes one there, never here; their engine may read a pattern of your own in another way (gpt4, gpt2: the same).
"""
import base64, json, re
from bpe import BYTES, merge

# Their vocabularies are text: every byte has a printable character, 'Ġ' is the blank.
CHARS = {b: chr(b) if i < 188 else chr(256 + i - 188) for i, b in enumerate(BYTES)}

# A turn as Tokenizer.render spells it.
CHAT_TEMPLATE = ("{{ '<|endoftext|>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
                 "{% if m['content'] %}{{ ' ' + m['content'] }}{% endif %}{{ '<|end|>' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")

def merges_of(tokens):
    """The two parts of every token of several bytes: what is left of it when only the tokens before it may be used."""
    ranks, merges = {}, []
    for i, token in enumerate(tokens):
        if len(token) > 1:
            *_, (parts, _, _) = merge(token, ranks)
            if len(parts) != 2:
                raise ValueError(f'token {i}, {token}, is not made of two tokens before it')
            merges.append(parts)
        ranks[token] = i
    return merges

def tokenizer_files(tok):
    """A Tokenizer -> {file name: its text}, for `tokenizers`, `transformers` (AutoTokenizer) and tiktoken."""
    char = tok.spec['kind'] == 'char'
    spell = bytes.decode if char else lambda token: ''.join(CHARS[b] for b in token)
    vocab = {spell(token): i for i, token in enumerate(tok.tokens)}
    level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=False)
    pattern = re.sub(r'\\U(.{8})', r'\\x{\1}', tok.spec['pattern']) # how their engine spells a character
    split = dict(type='Split', pattern=dict(Regex=pattern), invert=char,
                 behavior='Removed' if char else 'Isolated') # of char, what is no character of the table goes
    added = [dict(id=len(vocab) + i, content=name, special=True, single_word=False, lstrip=False, rstrip=False,
                  normalized=False) for i, name in enumerate(tok.spec['special_tokens'])]
    if char: # no merges: a table of characters
        model = dict(type='WordLevel', vocab=vocab, unk_token='')
    else:
        model = dict(type='BPE', vocab=vocab, merges=[' '.join(map(spell, parts)) for parts in merges_of(tok.tokens)],
                     dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                     fuse_unk=False, byte_fallback=False, ignore_merges=False)
    spec = dict(version='1.0', truncation=None, padding=None, added_tokens=added, normalizer=None, model=model,
                pre_tokenizer=split if char else dict(type='Sequence', pretokenizers=[split, level]),
                decoder=dict(type='Fuse') if char else level, post_processor=None)
    more = dict(tokenizer_class='PreTrainedTokenizerFast', bos_token='<|endoftext|>', eos_token='<|end|>',
                pad_token='<|pad|>', clean_up_tokenization_spaces=False, chat_template=CHAT_TEMPLATE)
    ranks = [f'{base64.b64encode(token).decode()} {i}\n' for i, token in enumerate(tok.tokens)]
    return {'tokenizer.json': json.dumps(spec, ensure_ascii=False, indent=1), 'tokenizer.tiktoken': ''.join(ranks),
            'tokenizer_config.json': json.dumps(more, indent=1)}
