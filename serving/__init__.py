"""Serving: the inference engine, a child process that answers many versions in one batch.

``client`` and ``protocol`` speak to it without torch; ``scheduler`` decides, ``runner`` computes,
``lane`` joins them for one base, ``engine`` drives the lanes, ``server`` holds the socket.
"""
