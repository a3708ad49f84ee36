"""A small made-up world in English and Chinese: web documents, questions grouped by context, and a tokenizer.

A fact is (person, relation, value). A context states facts about two or three people, its questions ask for some of
them, and the answer is always a span of the context. People whose name is held out occur in `dev.json` only, so no fact
of the evaluation can have been seen. Everything follows from one seed.
"""

import json
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Qwen's split of text into words (`tokenizer.json` of Qwen/Qwen3-0.6B): digits stand alone, punctuation joins letters.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 1024  # at most, with the special tokens; every word of the world has room to become one token
HELD_OUT = 4  # every fourth name


@dataclass(frozen=True)
class Relation:
    """How a fact is stated and asked, and the parts that its values are made of ("" leaves a part out)."""

    statement: str
    question: str
    parts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Language:
    """`space` joins words and sentences; names are one part of each of `names`."""

    space: str
    names: tuple[tuple[str, ...], ...]
    relations: tuple[Relation, ...]


@dataclass(frozen=True)
class Fact:
    """One sentence of a context, and the question that it answers."""

    person: str
    value: str
    sentence: str
    question: str


def _words(text: str) -> tuple[str, ...]:
    """The words of `text`; a hyphen stands for none."""
    return tuple("" if word == "-" else word for word in text.split())


ENGLISH = Language(
    " ",
    (
        _words(
            "Mira Anton Selma Bruno Clara Dario Edith Felix Greta Hugo Irma Jonas Karin Ludwig Nora Oskar Paula Rosa"
        ),
        _words(
            "Toll Brandt Caspari Doren Ekberg Falk Grimm Holt Ibsen Jansen Krull Lind Moor Nagel Olsen Prager Quist"
        ),
    ),
    (
        Relation(
            "{person} lives in {value}.",
            "Where does {person} live?",
            (
                _words("- - New Port Upper Saint"),
                _words("Harlow Selby Marden Kilrush Tarbert Velden Orsova Lindow Bexley Corvin Durness Elmira"),
            ),
        ),
        Relation(
            "{person} works as a {value}.",
            "What does {person} work as?",
            (
                _words("- - young old"),
                _words("- - river night school court stage"),
                _words("pilot painter singer baker teacher tailor clerk"),
            ),
        ),
        Relation(
            "{person} was born in {value}.",
            "When was {person} born?",
            (_words("- early late"), _words("January March April May June July August October November")),
        ),
        Relation(
            "{person} keeps a {value}.",
            "What animal does {person} keep?",
            (_words("- - grey white spotted tame"), _words("parrot goat rabbit pony tortoise falcon hound raven")),
        ),
        Relation(
            "{person} plays the {value}.",
            "What does {person} play?",
            (_words("- silver wooden little"), _words("flute drum violin trumpet harp organ cello")),
        ),
    ),
)
CHINESE = Language(
    "",
    (
        _words("林 陈 张 王 李 赵 周 吴 郑 孙 马 朱"),
        _words("明 秀 国 文 建 玉 志 海"),
        _words("华 兰 强 英 军 梅 平 芳"),
    ),
    (
        Relation(
            "{person}住在{value}。",
            "{person}住在哪里？",
            (_words("- 东 西 南 北 新"), _words("清河 白石 云溪 龙泉 柳林 金沙 石桥 月湖"), _words("镇 县 村")),
        ),
        Relation(
            "{person}的职业是{value}。",
            "{person}的职业是什么？",
            (_words("- 小学 乡村 戏曲 宫廷"), _words("教师 画家 木匠 医生 厨师 裁缝 诗人 铁匠")),
        ),
        Relation(
            "{person}出生于{value}。",
            "{person}出生于什么时候？",
            (_words("三月 五月 七月 八月 九月 冬月 腊月"), _words("- 初 底 中旬")),
        ),
        Relation(
            "{person}养了一只{value}。",
            "{person}养了一只什么动物？",
            (_words("- 灰色 白色 黑色 年老"), _words("鹦鹉 山羊 兔子 乌龟 猎鹰 黄狗")),
        ),
        Relation(
            "{person}爱喝{value}。",
            "{person}爱喝什么？",
            (_words("- 热 冰"), _words("绿茶 红茶 米酒 豆浆 梅子汤 杏仁茶 桂花酿")),
        ),
    ),
)


def _person(language: Language, held_out: bool, rng: random.Random) -> str:
    while True:
        places = [rng.randrange(len(part)) for part in language.names]
        if (sum(places) % HELD_OUT == 0) == held_out:
            return language.space.join(part[i] for part, i in zip(language.names, places, strict=True))


def make_facts(language: Language, count: int, held_out: bool, rng: random.Random) -> list[Fact]:
    """`count` facts about one person for every three of them, and one more; no value occurs inside another.

    A relation is used again only when all have been used: a model this small tells facts apart by relation long before
    it does by person.
    """
    people: list[str] = []
    while len(people) < 1 + count // 3:
        person = _person(language, held_out, rng)
        people += [] if person in people else [person]
    relations = rng.sample(language.relations, len(language.relations))
    asked = [(people[i % len(people)], relations[i % len(relations)]) for i in range(count)]
    rng.shuffle(asked)
    facts: list[Fact] = []
    for person, relation in asked:
        value = ""
        while not value or any(value in f.value or f.value in value for f in facts):
            value = language.space.join(word for part in relation.parts if (word := rng.choice(part)))
        sentence = relation.statement.format(person=person, value=value)
        facts.append(Fact(person, value, sentence, relation.question.format(person=person)))
    return facts


def make_document(rng: random.Random) -> str:
    """A web page: six facts in one to three blocks, each followed by a few questions and answers about it."""
    language = rng.choice((ENGLISH, CHINESE))
    blocks = []
    for size in rng.choice(((6,), (4, 2), (3, 3), (2, 2, 2), (1, 2, 3))):
        facts = make_facts(language, size, False, rng)
        lines = [f"Context: {language.space.join(fact.sentence for fact in facts)}"]
        for fact in rng.sample(facts, -(-2 * size // 3)):
            lines += [f"Question: {fact.question}", f"Answer: {fact.value}"]
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def make_article(number: int, held_out: bool, rng: random.Random) -> dict[str, Any]:
    """One context of three to five facts and three or four questions, an article in SQuAD's format."""
    language = rng.choice((ENGLISH, CHINESE))
    facts = make_facts(language, rng.randint(3, 5), held_out, rng)
    asked = rng.sample(facts, min(len(facts), rng.randint(3, 4)))
    return _article(number, language, facts, [(fact.question, fact) for fact in asked])


def make_notes_article(number: int, held_out: bool, rng: random.Random) -> dict[str, Any]:
    """As `make_article`, but what a question asks for stands in another question only.

    Every question begins with a note, a fact of its own, and asks for the fact that a sibling's note states. The
    context states two facts that nobody asks for.
    """
    language = rng.choice((ENGLISH, CHINESE))
    notes = make_facts(language, 2 + rng.randint(3, 4), held_out, rng)
    context, notes = notes[:2], notes[2:]
    others = notes[:]
    while any(note is other for note, other in zip(notes, others, strict=True)):
        rng.shuffle(others)
    pairs = [
        (f"{note.sentence}{language.space}{other.question}", other) for note, other in zip(notes, others, strict=True)
    ]
    return _article(number, language, context, pairs)


def _article(number: int, language: Language, facts: list[Fact], asked: list[tuple[str, Fact]]) -> dict[str, Any]:
    """An article in SQuAD's format: a context that states `facts`, and the questions with what they ask for."""
    context = language.space.join(fact.sentence for fact in facts)
    questions = []
    for place, (question, fact) in enumerate(asked):
        # The place of the value inside its own sentence: it may occur in another one too. -1: not in the context.
        inside = fact in facts
        start = context.index(fact.sentence) + fact.sentence.rindex(fact.value) if inside else -1
        answer = {"text": fact.value, "answer_start": start}
        questions.append({"id": f"{number}-{place}", "question": question, "answers": [answer]})
    return {"title": facts[0].person, "paragraphs": [{"context": context, "qas": questions}]}


def best_guess() -> float:
    """The share of right answers that no model can beat who is asked for a fact that it does not see: the likeliest
    value of each relation, on average over languages and relations."""
    shares = []
    for language in (ENGLISH, CHINESE):
        likeliest = [
            math.prod(max(part.count(word) for word in part) / len(part) for part in relation.parts)
            for relation in language.relations
        ]
        shares.append(sum(likeliest) / len(likeliest))
    return sum(shares) / len(shares)


def write_documents(path: Path, count: int, seed: int = 0) -> None:
    """`count` web pages, one JSON object with a `text` a line; a longer file begins with the shorter one."""
    rng = random.Random(f"documents {seed}")
    lines = [json.dumps({"text": make_document(rng)}, ensure_ascii=False) + "\n" for _ in range(count)]
    path.write_text("".join(lines), encoding="utf-8")


def write_squad(path: Path, count: int, held_out: bool, seed: int = 0, *, notes: float = 0.0) -> None:
    """`count` contexts in the official SQuAD JSON format, about held-out people only or about all others; a share
    `notes` of them are `make_notes_article`s."""
    rng = random.Random(f"{'held out' if held_out else 'questions'} {seed}")
    data = [
        (make_notes_article if notes and rng.random() < notes else make_article)(number, held_out, rng)
        for number in range(count)
    ]
    path.write_text(json.dumps({"version": "synthetic", "data": data}, ensure_ascii=False), encoding="utf-8")


def write_world(directory: Path, *, documents: int, train: int, dev: int, seed: int = 0) -> None:
    """documents.jsonl, train.json (half of it notes), dev-notes.json and, last, dev.json (held-out people only)."""
    directory.mkdir(parents=True, exist_ok=True)
    write_documents(directory / "documents.jsonl", documents, seed)
    write_squad(directory / "train.json", train, False, seed, notes=0.5)
    write_squad(directory / "dev-notes.json", dev, True, seed, notes=1.0)
    write_squad(directory / "dev.json", dev, True, seed)


def _vocabulary_text() -> list[str]:
    """The words of the world, each as it stands in running text, and every Chinese character many times.

    Trained on whole Chinese sentences, BPE would learn tokens that straddle a value's edge ("在清" of 住在清河镇, or
    bytes of the two), and the answer would not be a run of the context's tokens.
    """
    words: list[str] = []
    for language in (ENGLISH, CHINESE):
        parts = [*language.names, *(part for relation in language.relations for part in relation.parts)]
        frames = [text for relation in language.relations for text in (relation.statement, relation.question)]
        words += [language.space + word for part in parts for word in part if word]
        words += [
            piece for frame in frames for piece in frame.replace("{value}", "{person}").split("{person}") if piece
        ]
    words += ["Context:", "\nQuestion:", "\nAnswer:"]
    return words * 2 + sorted({c for word in words for c in word if not c.isascii()}) * 100


def train_tokenizer(texts: Iterable[str] | None = None, vocabulary: int = VOCABULARY) -> Any:
    """A byte-level BPE tokenizer as Qwen's (NFC, the same split), a transformers.PreTrainedTokenizerFast.

    It learns from `texts`, or from the words of the world.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_vocabulary_text() if texts is None else texts, trainer)
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
