"""Everything that draws: figures from result tables (:mod:`plots`) and the page that holds them (:mod:`page`)."""
