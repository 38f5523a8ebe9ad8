"""LeRobot data sets (LeRobotDataset v3.0 and v2.1), read and written without lerobot.

`layout` is what the metadata says, `rows` the parquet files, `video` the mp4 files, `reading` and
`writing` the conversions. Names of keys: LeRobot's ``observation.`` is left out in a store, so
``observation.state`` is ``state`` and ``observation.images.top`` is ``images.top``; ``action`` is
``action``. On the way back every key gets ``observation.`` again, and frames that are not named
``image...`` get ``observation.images.``.
"""
