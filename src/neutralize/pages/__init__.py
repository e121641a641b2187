"""Reports as HTML: one page that needs nothing else, and short pieces for notebooks; both from the same templates."""
