"""The demo: New York's flights of 2013 on shards that it starts, fills, asks and puts through a change of gates.

To read along: `models` has the tables, `acts` all work with the library, `fence` the client with an old map;
`story` puts them in order, and the rest reads the data, measures and prints.
"""
