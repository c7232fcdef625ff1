"""A document (eval.document) as Markdown and as LaTeX; the HTML page is eval.render_html.

The LaTeX compiles with pdfLaTeX, XeLaTeX and LuaLaTeX and needs booktabs, caption, float, graphicx and iftex. pdfLaTeX
shows Japanese where CJKutf8 and its `min` fonts are installed; what it has no character for it names by its code point.
"""

import re

from eval.document import Block, Column, Document, Heading, Inline, Paragraph, Picture, Row, Span, Table, spans

# What GitHub's Markdown would take for markup inside a line; an underscore between letters is none.
MD_MARKUP = re.compile(r"[\\`*|\[$]|(?<![^\W_])_|_(?![^\W_])|<(?=[\w/!?])|&(?=[#\w])|~(?=~)")


def markdown(document: Document) -> str:
    """The whole document; `#` is its title."""
    blocks = [f"# {_md_escape(document.title)}", *(markdown_block(block) for block in document.blocks)]
    return "\n\n".join(blocks) + "\n"


def markdown_block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_md_escape(block.text)}"
    if isinstance(block, Paragraph):
        return markdown_inline(block.text)
    if isinstance(block, Picture):
        return f"![{_md_escape(block.description)}]({block.png.as_posix()})"
    return markdown_table(block)


def markdown_table(table: Table, titled: bool = True) -> str:
    """Title, table, notes. Markdown has one line of heads, so a group's name stands in each of its columns."""
    heads = " | ".join(_md_escape(column.full_label) for column in table.columns)
    rules = "|".join("---:" if column.kind == "number" else "---" for column in table.columns)
    lines = [f"| {heads} |", f"|{rules}|"]
    lines += ["| " + " | ".join(markdown_inline(cell) for cell in row.cells) + " |" for row in table.rows]
    parts = [f"**{_md_escape(table.title)}**"] if titled and table.title else []
    return "\n\n".join([*parts, "\n".join(lines), *(markdown_inline(note) for note in table.notes)])


def markdown_inline(inline: Inline) -> str:
    return "".join(_md_span(span) for span in spans(inline))


def _md_span(span: Span) -> str:
    if span.kind == "code":
        fence = "``" if "`" in span.text else "`"
        return f"{fence}{_one_line(span.text).replace('|', chr(92) + '|')}{fence}"
    text = _md_escape(span.text)
    return f"**{text}**" if span.kind == "strong" else text


def _md_escape(text: str) -> str:
    return MD_MARKUP.sub(r"\\\g<0>", _one_line(text))


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


TEX_HEAD = r"""\documentclass[a4paper,landscape,10pt]{article}
\usepackage[margin=18mm]{geometry}
\usepackage{iftex,booktabs,caption,float,graphicx}
\ifPDFTeX
  \usepackage[T1]{fontenc}
  \usepackage[utf8]{inputenc}
  \usepackage{textcomp}
  \newif\ifhascjk
  \IfFileExists{c70min.fd}{\hascjktrue\usepackage{CJKutf8}}{}
  \ifhascjk\newcommand{\cjk}[1]{\begin{CJK}{UTF8}{min}#1\end{CJK}}\else\newcommand{\cjk}[1]{[CJK]}\fi
  \newcommand{\otherchar}[2]{{\scriptsize[U+#2]}}
\else
  \usepackage{fontspec}
  \IfFontExistsTF{Noto Sans CJK JP}{\newfontfamily{\cjkfont}{Noto Sans CJK JP}}{\newcommand{\cjkfont}{}}
  \newcommand{\cjk}[1]{{\cjkfont #1}}
  \newcommand{\otherchar}[2]{#1}
\fi
\setlength{\parindent}{0pt}
\setlength{\parskip}{6pt}
\newsavebox{\tablebox}
% a table as it is, or as narrow as the line
\newcommand{\fitted}[1]{\sbox{\tablebox}{#1}%
  \ifdim\wd\tablebox>\linewidth\resizebox{\linewidth}{!}{\usebox{\tablebox}}\else\usebox{\tablebox}\fi}
"""
TEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "'": r"{'}",
    "`": r"{\textasciigrave}",
    "-": r"{-}",
    "±": r"\ensuremath{\pm}",
    "×": r"\ensuremath{\times}",
    "−": r"\ensuremath{-}",
    "≤": r"\ensuremath{\leq}",
    "≥": r"\ensuremath{\geq}",
    "→": r"\ensuremath{\rightarrow}",
    "†": r"\textdagger{}",
    "‡": r"\textdaggerdbl{}",
    "\u00ad": r"\-",
    **{character: f"\\{character}" for character in "#$%&_"},
}
TEX_PLAIN = set("–—‘’‚“”„…•€™")
LONG = 0.75  # of the line's width, for all columns of long text together
CJK = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]+")


def latex(document: Document) -> str:
    """A document that compiles by itself; each table can also be copied out of it."""
    body = "\n\n".join(latex_block(block) for block in document.blocks)
    title = rf"\section*{{\LARGE {tex_escape(document.title)}}}"
    return f"{TEX_HEAD}\\begin{{document}}\n{title}\n\n{body}\n\\end{{document}}\n"


def latex_block(block: Block) -> str:
    if isinstance(block, Heading):
        return rf"\{'sub' * (block.level - 2)}section*{{{tex_escape(block.text)}}}"
    if isinstance(block, Paragraph):
        return latex_inline(block.text)
    if isinstance(block, Picture):
        return (
            "\\begin{figure}[H]\\centering\n"
            rf"\includegraphics[width=0.8\linewidth,height=0.75\textheight,keepaspectratio]{{{block.png.as_posix()}}}"
            f"\n\\caption{{{tex_escape(block.description)}}}\n\\end{{figure}}"
        )
    return latex_table(block)


def latex_table(table: Table) -> str:
    """A booktabs table; groups of columns with a rule below their name."""
    lines = ["\\begin{table}[H]\\centering", f"\\caption*{{{tex_escape(table.title)}}}\\label{{tab:{table.name}}}"]
    width = LONG / max(1, sum(column.kind == "long" for column in table.columns))
    kinds = "".join(_tex_column(column, width) for column in table.columns)
    lines += [rf"\fitted{{\begin{{tabular}}{{{kinds}}}", "\\toprule"]
    groups = table.groups()
    if groups:
        lines.append(" & ".join(_tex_group(name, width) for name, width in groups) + r" \\")
        lines.append(" ".join(_tex_rules(groups)))
    lines.append(" & ".join(tex_escape(column.label) for column in table.columns) + r" \\")
    lines.append("\\midrule")
    for place, row in enumerate(table.rows):
        lines += _tex_row(row, first=place == 0)
    lines += ["\\bottomrule", "\\end{tabular}}"]
    lines += [rf"\par\smallskip{{\footnotesize {latex_inline(note)}\par}}" for note in table.notes]
    return "\n".join([*lines, "\\end{table}"])


def latex_inline(inline: Inline) -> str:
    return "".join(_tex_span(span) for span in spans(inline))


def tex_escape(text: str) -> str:
    """Any text as LaTeX that prints it."""
    out, place, text = [], 0, _one_line(text)
    while place < len(text):
        run = CJK.match(text, place)
        if run:
            out.append(rf"\cjk{{{run.group()}}}")
            place = run.end()
            continue
        out.append(_tex_character(text[place]))
        place += 1
    return "".join(out)


def _tex_character(character: str) -> str:
    if character in TEX_SPECIAL:
        return TEX_SPECIAL[character]
    if " " <= character < "\x7f" or "\xa1" <= character <= "\u017f" or character in TEX_PLAIN:
        return character
    if not character.isprintable():
        return ""
    return rf"\otherchar{{{character}}}{{{ord(character):04X}}}"


def _tex_span(span: Span) -> str:
    text = tex_escape(span.text)
    return {"plain": text, "code": rf"\texttt{{{text}}}", "strong": rf"\textbf{{{text}}}"}[span.kind]


def _tex_column(column: Column, width: float) -> str:
    return {"text": "l", "number": "r", "long": rf"p{{{width:.2f}\linewidth}}"}[column.kind]


def _tex_group(name: str, width: int) -> str:
    return rf"\multicolumn{{{width}}}{{c}}{{{tex_escape(name)}}}" if name else " & " * (width - 1)


def _tex_rules(groups: list[tuple[str, int]]) -> list[str]:
    rules, start = [], 1
    for name, width in groups:
        if name:
            rules.append(rf"\cmidrule(lr){{{start}-{start + width - 1}}}")
        start += width
    return rules


def _tex_row(row: Row, first: bool) -> list[str]:
    rule = ["\\midrule"] if row.rule and not first else []
    # a row that begins with a bracket would be read as the option of the line break before it
    cells = " & ".join(latex_inline(cell) for cell in row.cells)
    return [*rule, ("{}" if cells.startswith("[") else "") + cells + r" \\"]
