"""A small byte-level BPE tokenizer with a ChatML-like template, built from the text below: no download, any input.

The 256 bytes come first, then merges learnt from the text, then the special tokens, so that ids below `NUM_PLAIN` are
ordinary text and every string can be encoded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

BOS, EOS, IM_START, IM_END = "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 512
NUM_PLAIN = VOCAB_SIZE - 4

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

_TEXT = """
The harbour wakes before the town. Gulls argue over the nets, a crane swings slowly across the light, and somewhere a
radio gives the weather for ships that are still far out at sea. The man who keeps the lighthouse writes every sailing
in a book: the hour, the wind, the name of the vessel and where it is bound. He has done this for thirty years, and he
says that the numbers speak to him more clearly than people do. When the morning is grey he lights the lamp again.

On the hill above the harbour there is a school with one large room. The children learn to read from old letters and
to count with shells; they know that seven times eight is fifty-six, and that a question is worth more than an answer.
Their teacher asks them what they would send to a friend on the other side of the world. A map, says one. A song, says
another. A machine that can carry a message without forgetting any part of it, says the third, and everybody laughs.

How does a message travel? First it is written, then it is cut into pieces, then each piece is given a number, so that
whoever receives them can put them together in the right order. If one piece is lost it must be sent again; if it comes
twice, the second is thrown away. Nothing else is needed, but all of it is needed. The rest is only a matter of speed.

In the evening the baker closes his shop, the boats return one after another, and the windows of the long street begin
to shine. You can hear the water under the bridge and the bells of the tower. Good night, says the town to the sea, and
the sea, which never sleeps, answers in its own language: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 waves, and then it starts again.
"""


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Where the special tokens are in the vocabulary."""

    bos: int
    eos: int
    im_end: int


def save_tokenizer(folder: Path, max_length: int) -> SpecialIds:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer = _train()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": IM_END,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    ids = tokenizer.get_vocab(with_added_tokens=True)
    return SpecialIds(bos=ids[BOS], eos=ids[EOS], im_end=ids[IM_END])


def plain_text_ids() -> list[int]:
    """Ids of the tokens that are printable ASCII."""
    tokenizer = _train()
    texts = {index: tokenizer.decode([index]) for index in range(NUM_PLAIN)}
    return [index for index, text in texts.items() if text.isascii() and (text.isprintable() or text == "\n")]


def _train() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=NUM_PLAIN, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.add_special_tokens([BOS, EOS, IM_START, IM_END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer
