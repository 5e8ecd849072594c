"""The stream: checkpoints of many agents as numbered, hash-chained segments in every region (DESIGN section 4).

- ``limits``    how large and how odd anything that arrives may be
- ``delta``     bodies to frames and back: raw, zstd, zstd against the previous body
- ``segment``   frames to bytes and back: segment objects and ingest batches (``FORMAT.md`` is the byte-exact page)
- ``view``      the local SQLite index of one region's copy, with the latest bodies warm and proven
- ``reader``    bodies that are not warm, fetched from the store along their delta chain
- ``follower``  a standby's loop body: read, verify and index what is new in its own region's store
- ``writer``, ``opening``  the holder's side: commit to every region; open an epoch
"""
