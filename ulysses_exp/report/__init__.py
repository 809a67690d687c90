"""Views of results.json and metrics.jsonl: the terminal, report.html, report.md, pictures."""
