"""The text stage: tokenizer, captions, and a CLIPTextModel that knows which words belong together."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_booth.toybox import world
from lora_booth.toybox.judge import OBJECT_HEADS, OBJECTS, SCENE_HEADS
from lora_booth.toybox.scenery import CONTEXTS

from . import pictures, scenes
from .judge import labels
from .stages import Stage, run_stage

RARE_TOKENS = ("sks", "zwx", "qlo", "vrn", "xjk", "ohwx")  # in the vocabulary, never in a training caption
MAX_TOKENS = 24
TEXT_WIDTH = 128
CANDIDATES = 400  # embeddings tried for each rare token; chosen


def new_tokenizer() -> Any:
    """A CLIP tokenizer in which every word of the world's captions, and every rare token, is one token."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = {w for c in CONTEXTS for w in c.split()} | set(world.CLASSES) | set(world.COLORS) | set(world.STYLES)
    words |= {*scenes.ACCESSORY_WORDS.values(), *scenes.PATTERN_WORDS.values()}
    words |= {"a", "an", "and", "of", *scenes.named_looks(), *RARE_TOKENS}
    letters = list(bytes_to_unicode().values())
    vocabulary, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    spellings = {word: [*word[:-1], word[-1] + "</w>"] for word in sorted(words)}
    while pairs := Counter(p for s in spellings.values() for p in pairwise(s)):  # byte-pair encoding, most frequent first
        pair = max(sorted(pairs), key=pairs.__getitem__)
        merges.append(pair)
        vocabulary.append("".join(pair))
        spellings = {word: merged(spelling, pair) for word, spelling in spellings.items()}
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(vocabulary)}, merges=merges, model_max_length=MAX_TOKENS)
    for word in words:
        if len(tokenizer(word).input_ids) != 3:
            raise RuntimeError(f"{word!r} is not one token: {tokenizer.tokenize(word)}")
    return tokenizer


def merged(spelling: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for piece in spelling:
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return result


def token_ids(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """(N, MAX_TOKENS) int64"""
    return tokenizer(list(prompts), padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids


def new_text_encoder(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@dataclass(frozen=True)
class Wording:
    """What a caption says: of each object, see `scenes.phrase`, and whether where it is."""

    told: tuple[Collection[str], ...]
    context: bool

    def caption(self, scene: world.Scene) -> str:
        return scenes.caption(scene, self.told, context=self.context)


def training_wording(scene: world.Scene, rng: random.Random) -> Wording:
    def details(identity: world.Identity) -> Collection[str]:
        if scenes.name_of(identity) and rng.random() < 0.6:
            return ("name",)
        if rng.random() < 0.3:  # as people write: the noun, and often a colour
            return ("color",) if rng.random() < 0.6 else ()
        return [detail for detail in scenes.DETAILS if rng.random() < 0.7]

    return Wording(tuple(details(o) for o in scene.objects), context=rng.random() < 0.85)


# what has to be told for a head of the reader to know its answer
HEAD_DETAILS = {"color": "color", "second": "pattern", "pattern": "pattern", "third": "accessory", "accessory": "accessory"}


def stated(scene: world.Scene, wording: Wording) -> list[int]:
    """`labels` of what a caption in this wording states; -100 for the rest."""
    known = [
        name == "class_noun" or bool({"name", HEAD_DETAILS[name]} & set(told))
        for told in (*wording.told, ())[:OBJECTS]
        for name in OBJECT_HEADS
    ]
    known += [wording.context, True]  # SCENE_HEADS
    return [label if is_known else -100 for label, is_known in zip(labels(scene), known, strict=True)]


NOTHING_STATED = [-100] * (OBJECTS * len(OBJECT_HEADS) + len(SCENE_HEADS))  # of an empty prompt

TEXT_STAGE = Stage("text", steps=1500, batch=128, rate=2e-3)


class TextReader(nn.Module):
    """The text encoder with linear heads: the state of a class noun tells the object's look, the last state the scene.

    CLIP's text encoder has learnt from pictures which words belong together before Stable Diffusion begins; so does ours.
    """

    def __init__(self, text_encoder: Any, nouns: Tensor) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.nouns = nouns  # (classes,) int64: their tokens
        self.object_heads = nn.ModuleDict({name: nn.Linear(TEXT_WIDTH, len(values)) for name, values in OBJECT_HEADS.items()})
        self.scene_heads = nn.ModuleDict({name: nn.Linear(TEXT_WIDTH, len(values)) for name, values in SCENE_HEADS.items()})

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """(N, MAX_TOKENS) int64, (N, heads) int64 -> states (N, MAX_TOKENS, TEXT_WIDTH), and logits and targets of every
        head, rows with such an object only."""
        states = self.text_encoder(ids).last_hidden_state
        is_noun = torch.isin(ids, self.nouns)
        position = is_noun.cumsum(1)
        answers, columns = [], iter(targets.T)
        for slot in range(OBJECTS):
            row, place = (is_noun & (position == slot + 1)).nonzero(as_tuple=True)
            answers += [(read(head, states[row, place]), next(columns)[row]) for head in self.object_heads.values()]
        return states, answers + [(read(head, states[:, -1]), next(columns)) for head in self.scene_heads.values()]


def read(head: Any, states: Tensor) -> Tensor:
    """Logits by directions of unit length: what is easy to read stands out in the states too."""
    return F.linear(states, F.normalize(head.weight, dim=1), head.bias)


def reading_loss(answers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    losses = [F.cross_entropy(logits.float(), t, ignore_index=-100) for logits, t in answers]
    return torch.stack([loss for loss in losses if loss.isfinite()]).mean()  # a batch may have no second object


def train_text_encoder(work: Path, device: torch.device, log: dict[str, Any], tokenizer: Any) -> TextReader:
    drawn = pictures.PLAIN.scenes() + pictures.NAMED.scenes()

    def answers(reader: Any, step: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        rng, prompts, targets = random.Random(f"text {step}"), [], []
        for i in torch.randint(len(drawn), (TEXT_STAGE.batch,), generator=generator).tolist():
            wording = training_wording(drawn[i], rng)
            prompts.append(wording.caption(drawn[i]))
            targets.append(stated(drawn[i], wording))
        return reader(token_ids(tokenizer, prompts).to(device), torch.tensor(targets, device=device))[1]

    @torch.no_grad()
    def evaluate(reader: Any) -> dict[str, float]:
        found = answers(reader, -1, torch.Generator().manual_seed(0))
        right = torch.cat([(logits.argmax(1) == t)[t != -100] for logits, t in found])
        return {"accuracy": right.float().mean().item()}

    nouns = token_ids(tokenizer, world.CLASSES)[:, 1].to(device)
    reader: Any = TextReader(new_text_encoder(tokenizer), nouns).to(device)
    trained = run_stage(TEXT_STAGE, reader, lambda *step: reading_loss(answers(*step)), work, log, evaluate=evaluate)
    return trained.requires_grad_(True).train()


@torch.no_grad()
def place_rare_tokens(text_encoder: Any, tokenizer: Any) -> dict[str, float]:
    """Give every rare token an embedding that the text encoder can tell from its words; returns how far each stands.

    CLIP has seen its rare tokens a few times, so each has a state of its own. Ours were never trained: the text
    encoder is blind to their initial directions, and "sks dog" would read like "a dog". Each gets the mixture of name
    embeddings, as long as a name's, that stands farthest from every colour, the article and the tokens before it.
    """
    generator = torch.Generator().manual_seed(0)
    table = text_encoder.get_input_embeddings().weight
    one = {w: tokenizer(w).input_ids[1] for w in (*world.COLORS, *scenes.named_looks(), "a", *RARE_TOKENS)}
    names = table[[one[name] for name in scenes.named_looks()]]
    length = names.norm(dim=1).mean()

    def states(word: str) -> Tensor:
        prompts = [f"a photo of {word} {noun}" for noun in ("dog", "mug")]
        return text_encoder(token_ids(tokenizer, prompts).to(table.device)).last_hidden_state.flatten()

    taken, distances = [states(w) for w in (*world.COLORS, "a")], {}
    for token in RARE_TOKENS:
        best, farthest = table[one[token]].clone(), 0.0
        for _ in range(CANDIDATES):
            mixture = torch.randn(len(names), generator=generator).to(table) @ (names - names.mean(0))
            table[one[token]] = names.mean(0) + mixture / mixture.norm() * length
            state = states(token)
            nearest = min((state - other).norm().item() for other in taken)
            if nearest > farthest:
                best, farthest = table[one[token]].clone(), nearest
        table[one[token]] = best
        taken.append(states(token))
        distances[token] = round(farthest, 2)
    return distances
