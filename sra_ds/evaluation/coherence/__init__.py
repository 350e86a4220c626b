"""How coherent a text is, in four numbers that are never made one; `docs/coherence.md` explains them.

    documents ──> human, sentence-shuffled, word-shuffled, looped and gibberish texts
    prompts   ──> generated texts, of one model or of two side by side
    text ──> sentences ──┬─ tags    ──> entity: does the order of the entities matter?   lexical
                         ├─ vectors ──> semantic: are neighbours closer than strangers?
                         └─ a judge ──> discourse: is this order likelier than others?

A measure of a document is a pure function in [0, 1], NaN where it is not defined; `measures` takes means
over documents with their intervals, `report` puts kinds of documents side by side.
"""
