"""The witness of the soak: runs in the interpreter of every machine, and is forked with it.

It holds numbers, one a page, in its memory and in a file; a page is its number repeated. `put` writes what
the soak's model writes as well, `look` says what every page has, or which is torn.
"""
import os, struct

MEMORY, DISK, PAGE = 512, 128, 4096
memory = bytearray(MEMORY * PAGE)
disk = os.open("/root/witness", os.O_RDWR | os.O_CREAT)
os.ftruncate(disk, DISK * PAGE)


def page(number):
    return struct.pack("<Q", number) * (PAGE // 8)


def put(to_disk, first, step, count, number, settle):
    for index in range(count):
        at = (first + index * step) % (DISK if to_disk else MEMORY) * PAGE
        if to_disk:
            os.pwrite(disk, page(number + index), at)
        else:
            memory[at : at + PAGE] = page(number + index)
    if settle and to_disk:
        os.fsync(disk)
    elif settle:
        # Memory that is taken and given back: the machine's balloon tells the host.
        passing = bytearray(b"x") * (4 << 20)
        del passing


def look(cold):
    if cold:
        # The file has to come from the disk again.
        os.fsync(disk)
        os.posix_fadvise(disk, 0, 0, os.POSIX_FADV_DONTNEED)
    for which in memory, os.pread(disk, DISK * PAGE, 0):
        numbers = []
        for at in range(0, len(which), PAGE):
            found = bytes(which[at : at + PAGE])
            number = struct.unpack_from("<Q", found)[0]
            numbers.append("%x" % number if found == page(number) else "torn")
        print(" ".join(numbers))
