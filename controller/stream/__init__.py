"""The stream: checkpoints of many agents as numbered, hash-chained segments in every region (DESIGN section 4).

- ``limits``    how large and how odd anything that arrives may be
- ``delta``     bodies to frames and back: raw, zstd, zstd against the previous body
- ``segment``   frames to bytes and back: segment objects and ingest batches (``FORMAT.md`` is the byte-exact page)
- ``view``      the local SQLite index of one region's copy, with the latest bodies warm and proven: positions and every change
- ``records``   the half of it that only reads: agents, their records, bodies that are warm
- ``warmth``    the newest bodies in memory, in front of the view's file
- ``reader``    bodies that are not warm, fetched from the store along their delta chain
- ``snapshot``  the view's rows as one object, so that a cold start reads that and a short tail
- ``keeping``   what retention asks the view; ``live`` which records an agent's newest state stands on
- ``follower``  a standby's loop body: read, verify and index what is new in its own region's store
- ``writer``    the holder's side, put together from ``admission`` (what may be taken), ``batcher`` (what shares a segment),
  ``pump`` (one region's way), ``flight`` (what is on it), ``log`` (what some store lacks), ``backlog`` (counted for the lag),
  ``receipt`` (who waits)
"""
