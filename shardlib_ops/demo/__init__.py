"""The demo: New York's flights of 2013 on shards that it starts, fills and asks, and one of which it splits.

To read along: `models` has the tables, `acts` all work with the library, `fence` the client with an old map, and
`moves` the second act, in which `clients` work on flights and `resharding` runs the jobs; `story` puts them in order,
and the rest reads the data, measures and prints.
"""
