"""Which training documents help with which targets: Influence Distillation (arXiv 2505.19051) in its offline form.

May import targets and what lies below them. Open `scores.py` first; the command is `cli.influence`.
"""
