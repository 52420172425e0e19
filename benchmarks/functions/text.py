"""HTML from templates."""


def table(rows, columns):
    """Fill a table of rows × columns cells, each escaped, and join it."""
    from html import escape
    from string import Template

    cell, row = Template("<td>$value</td>"), Template("<tr class='$kind'>$cells</tr>")
    lines = []
    for i in range(rows):
        values = {f"column {j} & more": f"<{i}×{j}>" for j in range(columns)}
        cells = [cell.substitute(value=escape(v)) for v in values.values()]
        lines.append(row.substitute(kind=("even", "odd")[i % 2], cells="".join(cells)))
    return len("<table>\n" + "\n".join(lines) + "\n</table>")


def dynamic_html(count, words):
    """Render a page with `count` entries of a news feed, each of `words` words."""
    import random
    from string import Template

    rng = random.Random(count)
    page = Template("<html><title>$user</title><ul>$entries</ul></html>")
    entry = Template("<li id='$number'><b>$title</b><p>$text</p></li>")
    feed = []
    for number in range(count):
        text = " ".join(f"w{rng.randrange(10_000)}" for _ in range(words))
        feed.append({"number": number, "title": text[:20].upper(), "text": text})
    feed.sort(key=lambda item: item["title"])
    return len(page.substitute(user="you", entries="".join(map(entry.substitute, feed))))
