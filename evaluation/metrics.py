"""Metrics of answers, between 0 and 1. With several references the best match counts."""

import re
import string
from collections import Counter
from collections.abc import Sequence

VQA_REFERENCES = 4  # with fewer references, no answer can have an accuracy of 1
ANLS_THRESHOLD = 0.5


def score(answer: str, references: Sequence[str]) -> dict[str, float]:
    """Compute all metrics that apply: metric -> score; empty without references."""
    if not references:
        return {}
    scores = {"exact_match": exact_match(answer, references)}
    if len(references) >= VQA_REFERENCES:
        scores["vqa_accuracy"] = vqa_accuracy(answer, references)
    return scores | {"anls": anls(answer, references), "token_f1": token_f1(answer, references)}


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer equals a reference, apart from surrounding white space, else 0."""
    return float(answer.strip() in {reference.strip() for reference in references})


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """min(matches / 3, 1), averaged over all subsets that omit one reference (https://visualqa.org/evaluation.html).

    Answer and references are normalized (`vqa_normalize`). The released script does not normalize if all references are
    equal, so that "Yes." is wrong if ten humans said "yes"; here both are always normalized.
    """
    normalized = vqa_normalize(answer)
    matches = [vqa_normalize(reference) == normalized for reference in references]
    others = [sum(matches) - own for own in matches]
    return sum(min(count / 3, 1.0) for count in others) / len(others)


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalized Levenshtein similarity: 1 - edits / length of the longer text, and 0 if this is below 0.5.

    As in the DocVQA challenge's script (arXiv 1907.00490): in lower case, with white space collapsed.

    Raises:
        ImportError: without the package rapidfuzz.
    """
    from rapidfuzz.distance import Levenshtein

    def plain(text: str) -> str:
        return " ".join(text.lower().split())

    best = max(Levenshtein.normalized_similarity(plain(answer), plain(reference)) for reference in references)
    return best if best >= ANLS_THRESHOLD else 0.0


def token_f1(answer: str, references: Sequence[str]) -> float:
    """F1 of common words as in SQuAD (arXiv 1606.05250): in lower case, without punctuation and articles.

    If one text has no words, it is 1 if the other has none either, else 0 (arXiv 1806.03822).
    """
    return max(_f1(_words(answer), _words(reference)) for reference in references)


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference))


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split()


# -- VQA ------------------------------------------------------------------------------------------------------------------

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
} | {"none": "0"}

# The benchmark's contractions, for which a missing apostrophe is added. It omits those that are other words without it:
# she'd, she'll, we'd, we'll, he'll, I'll, ...
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
    oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:index] + word[index + 1 :] for index, letter in enumerate(word) if letter == "'"]


_COMPLETE = {shorter: word for word in _CONTRACTIONS.split() for shorter in _without_one_apostrophe(word)}


def vqa_normalize(text: str) -> str:
    """Normalize an answer as the VQA benchmark does: lower case, no punctuation, no articles, digits, full contractions.

    A punctuation mark becomes a space. It is removed instead if it occurs next to a space, or if the text has a comma
    between digits. A full stop is removed unless a digit follows it.
    """
    text = " ".join(text.split())
    number = re.search(r"\d,\d", text) is not None
    bare = text
    for mark in _PUNCTUATION:
        bare = bare.replace(mark, "" if number or f"{mark} " in text or f" {mark}" in text else " ")
    bare = re.sub(r"\.(?!\d)", "", bare)
    words = [_NUMBERS.get(word, word) for word in bare.lower().split()]
    return " ".join(_COMPLETE.get(word, word) for word in words if word not in ("a", "an", "the"))
