"""How right an answer is: numbers between 0 and 1. With several references the best one counts."""

import re
import string
from collections import Counter
from collections.abc import Sequence

VQA_REFERENCES = 4  # with fewer, not even an answer that all humans gave has an accuracy of 1
ANLS_THRESHOLD = 0.5


def score(answer: str, references: Sequence[str]) -> dict[str, float]:
    """All metrics that apply: metric -> score; none without references."""
    if not references:
        return {}
    scores = {"exact_match": exact_match(answer, references)}
    if len(references) >= VQA_REFERENCES:
        scores["vqa_accuracy"] = vqa_accuracy(answer, references)
    return scores | {"anls": anls(answer, references), "token_f1": token_f1(answer, references)}


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is a reference to the letter, but for white space around it, else 0."""
    return float(answer.strip() in {reference.strip() for reference in references})


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """min(matches / 3, 1), averaged over all sets of references but one (https://visualqa.org/evaluation.html).

    Both sides are normalized (`vqa_normalize`). The released script leaves that out for questions whose references are all
    the same, so that "Yes." is wrong where ten humans said "yes"; here it is done for all.
    """
    said = vqa_normalize(answer)
    matches = [vqa_normalize(reference) == said for reference in references]
    others = [sum(matches) - own for own in matches]
    return sum(min(count / 3, 1.0) for count in others) / len(others)


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalized Levenshtein similarity: 1 - edits / the longer length, 0 below 0.5.

    As the DocVQA challenge's script has it (arXiv 1907.00490): in lower case, white space collapsed; a similarity of exactly
    0.5 counts.

    Raises:
        ImportError: without the package rapidfuzz.
    """
    from rapidfuzz.distance import Levenshtein

    def plain(text: str) -> str:
        return " ".join(text.lower().split())

    best = max(Levenshtein.normalized_similarity(plain(answer), plain(reference)) for reference in references)
    return best if best >= ANLS_THRESHOLD else 0.0


def token_f1(answer: str, references: Sequence[str]) -> float:
    """F1 of the words in common, as SQuAD counts them (arXiv 1606.05250): in lower case, without punctuation and articles.

    If one side has no words, it is 1 if the other has none either, else 0 (arXiv 1806.03822).
    """
    return max(_f1(_words(answer), _words(reference)) for reference in references)


def _f1(said: list[str], known: list[str]) -> float:
    if not said or not known:
        return float(said == known)
    common = sum((Counter(said) & Counter(known)).values())
    return 2 * common / (len(said) + len(known))


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split()


# -- VQA ------------------------------------------------------------------------------------------------------------------

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
} | {"none": "0"}

# Contractions that the benchmark knows; one that lacks an apostrophe is completed. Not here, as without it they are other
# words: she'd, she'll, we'd, we'll, he'll, I'll, ...
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
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


_COMPLETE = {shorter: word for word in _CONTRACTIONS.split() for shorter in _without_one_apostrophe(word)}


def vqa_normalize(text: str) -> str:
    """An answer as the VQA benchmark compares it: lower case, no punctuation, no articles, digits, whole contractions.

    A mark of punctuation becomes a space, unless it stands beside one somewhere, or there is a comma between digits: then
    all such marks go. A point goes unless a digit follows it.
    """
    text = " ".join(text.split())
    number = re.search(r"\d,\d", text) is not None
    bare = text
    for mark in _PUNCTUATION:
        bare = bare.replace(mark, "" if number or f"{mark} " in text or f" {mark}" in text else " ")
    bare = re.sub(r"\.(?!\d)", "", bare)
    words = [_NUMBERS.get(word, word) for word in bare.lower().split()]
    return " ".join(_COMPLETE.get(word, word) for word in words if word not in ("a", "an", "the"))
