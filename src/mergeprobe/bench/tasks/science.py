"""The bank's science: facts from short lists, combined, and small calculations."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, islice

from mergeprobe.bench.tasks.items import POOL, Keyed, comma, counted, draws, listed, said
from mergeprobe.bench.tasks.task import Task

# name, symbol, mass rounded to a whole number of atomic units
ELEMENTS = (
    *(("hydrogen", "H", 1), ("lithium", "Li", 7), ("carbon", "C", 12), ("nitrogen", "N", 14)),
    *(("oxygen", "O", 16), ("fluorine", "F", 19), ("sodium", "Na", 23), ("magnesium", "Mg", 24)),
    *(("aluminium", "Al", 27), ("silicon", "Si", 28), ("phosphorus", "P", 31), ("sulfur", "S", 32)),
    *(
        ("potassium", "K", 39),
        ("calcium", "Ca", 40),
        ("titanium", "Ti", 48),
        ("chromium", "Cr", 52),
    ),
    *(("manganese", "Mn", 55), ("iron", "Fe", 56), ("cobalt", "Co", 59), ("nickel", "Ni", 59)),
    *(("copper", "Cu", 64), ("zinc", "Zn", 65), ("bromine", "Br", 80), ("silver", "Ag", 108)),
    *(("tin", "Sn", 119), ("iodine", "I", 127), ("gold", "Au", 197), ("lead", "Pb", 207)),
)


def compounds() -> Iterator[tuple[tuple[str, str, int, int], tuple[str, str, int, int]]]:
    """Two elements, each with its count of atoms: (name, symbol, mass, count)."""
    for a, b, m, n in islice(draws("compounds", len(ELEMENTS), len(ELEMENTS), 4, 4), POOL):
        if a != b:
            yield (*ELEMENTS[a], m + 1), (*ELEMENTS[b], n + 1)


def _atoms(first: tuple[str, str, int, int], second: tuple[str, str, int, int]) -> str:
    return f"{first[3]} {first[0]}, {second[3]} {second[0]}"


def formulas() -> Keyed:
    for parts in compounds():
        answer = "".join(f"{symbol}{n if n > 1 else ''}" for _, symbol, _, n in parts)
        yield _atoms(*parts), said(f"Molecule of {_atoms(*parts)}:", answer)


def molar_masses() -> Keyed:
    for parts in compounds():
        total = sum(mass * n for _, _, mass, n in parts)
        yield _atoms(*parts), counted(f"Molecule of {_atoms(*parts)}:", total)


# typical adults from light to heavy; of those that weigh about the same, one is listed
BY_WEIGHT = listed(
    """
    ant ladybug bee moth hummingbird shrew mouse sparrow frog starling hamster mole rat crow
    squirrel hedgehog duck owl hare goose fox raccoon otter badger coyote lynx beaver baboon
    wolf cheetah goat sheep panda ostrich reindeer gorilla lion tiger donkey zebra bear
    moose camel cow buffalo giraffe walrus hippopotamus rhinoceros orca elephant whale
    """
)


def heavier(first: bool) -> Keyed:
    """Every pair of animals in both orders, which share a key."""
    for light, heavy in combinations(BY_WEIGHT, 2):
        for pair in ((light, heavy), (heavy, light)):
            answer = heavy if first else light
            yield f"{light} {heavy}", said(f"Animals, {comma(pair)}:", answer)


def heavier_animal() -> Keyed:
    return heavier(True)


def lighter_animal() -> Keyed:
    return heavier(False)


CLASSES = {
    "birds": listed("sparrow eagle robin owl crow parrot penguin swan pigeon falcon heron stork"),
    "fish": listed("trout salmon tuna cod shark carp herring pike eel sardine mackerel halibut"),
    "insects": listed("ant bee wasp beetle moth mosquito termite cricket ladybug flea locust fly"),
    "mammals": listed("horse whale mouse tiger rabbit camel dolphin sheep bear monkey deer lion"),
    "trees": listed("oak birch pine willow cedar elm beech spruce poplar larch ash fir"),
    "fruits": listed("apple banana cherry mango peach grape melon kiwi lemon apricot papaya fig"),
    "metals": listed(
        """
    iron copper zinc silver tin nickel lead cobalt gold platinum chromium sodium
    """
    ),
    "gases": listed("oxygen helium neon argon nitrogen methane hydrogen krypton xenon propane"),
    "planets": listed("Mars Venus Jupiter Saturn Mercury Neptune Uranus Earth"),
    "organs": listed("heart liver lung kidney stomach brain spleen bladder pancreas skin"),
}


def groups() -> Iterator[tuple[tuple[str, ...], str, str]]:
    """(three of one class and one of another in some order, the odd one, the class of the three)"""
    names = list(CLASSES)
    sizes = (len(names), len(names), 4, 12, 12, 12, 12)
    seen = set()
    for one, other, place, odd, *three in draws("groups", *sizes):
        pool, rest = CLASSES[names[one]], CLASSES[names[other]]
        words = [pool[k % len(pool)] for k in three]
        if one == other or len(set(words)) < 3:
            continue
        stranger = rest[odd % len(rest)]
        shown = (*words[:place], stranger, *words[place:])
        if shown not in seen:
            seen.add(shown)
            yield shown, stranger, names[one]


def odd_one_out() -> Keyed:
    for words, odd, _ in islice(groups(), POOL):
        yield comma(sorted(words)), said(f"Group: {comma(words)}", odd)


def common_class() -> Keyed:
    for words, _, name in islice(groups(), POOL):
        yield comma(sorted(words)), said(f"Group: {comma(words)}", name)


def forces() -> Keyed:
    """Two digits times one digit, as mass times acceleration."""
    for tenths, a in islice(draws("forces", 480, 8), POOL):
        mass, a = tenths + 11, a + 2
        yield f"{mass}*{a}", said(f"Mass {mass} kg, acceleration {a} m/s2, force:", f"{mass * a} N")


def currents() -> Keyed:
    """Whole answers: the voltage is resistance times current."""
    for r, i in islice(draws("currents", 11, 298), POOL):
        r, i = r + 2, i + 2
        yield f"{r * i}/{r}", said(f"{r * i} volts across {r} ohms drive", f"{i} A")


def half_lives() -> Keyed:
    for n, left in islice(draws("half-lives", 5, 500), POOL):
        n, left = n + 1, left + 1
        start = left * 2**n
        yield f"{start} {n}", said(f"After {n} half-lives, {start} mg become", f"{left} mg")


def strands() -> Iterator[str]:
    """Seven bases, spaced so that each is a token."""
    for chosen in islice(draws("strands", *([4] * 7)), POOL):
        yield " ".join("ACGT"[k] for k in chosen)


def complements() -> Keyed:
    for strand in strands():
        answer = strand.translate(str.maketrans("ACGT", "TGCA"))
        yield strand, said(f"Strand {strand} ->", answer)


def reversed_strands() -> Keyed:
    for strand in strands():
        yield strand, said(f"Strand {strand} ->", strand[::-1])


TASKS = (
    Task("formula", "science", "the formula of two elements and their counts", formulas),
    Task("molar_mass", "science", "the mass of the same molecule", molar_masses),
    Task("heavier", "science", "the heavier of two animals", heavier_animal),
    Task("lighter", "science", "the lighter of the same two animals", lighter_animal),
    Task("odd_one_out", "science", "the word of another class", odd_one_out),
    Task("common_class", "science", "the class of the other three words", common_class),
    Task("force", "science", "mass times acceleration", forces),
    Task("current", "science", "voltage over resistance", currents),
    Task("half_life", "science", "what is left after some half-lives", half_lives),
    Task("complement", "science", "the complementary strand of DNA", complements),
    Task("reversed_strand", "science", "the same strand read backwards", reversed_strands),
)
