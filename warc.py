"""
WARC files, in which crawlers keep pages as they came over the network (ISO 28500), and WET files with their text.

A file is a row of records: a line WARC/1.x, fields, an empty line, Content-Length bytes. In .warc.gz each record is a
gzip member of its own, so that one can be read, or lost, without the others. Files of a gigabyte come cut, with holes
and with false lengths; here damage costs the record in which it is, and is counted. Nothing is ever held that is larger
than LIMIT, whatever a file says or unpacks to.
"""
import contextlib, re, zlib

LIMIT = 50_000_000 # bytes of one page, row or document: a larger one is left out

def unzipped(f, zipped, skipped, block=1 << 16):
    """
    The bytes of a file, gzip members or none, in pieces of at most 1 MB; an empty piece where something is lost: what
    is no gzip, up to the next member, or the rest of a member that swells 200-fold, beyond LIMIT.
    """
    raw, member, lost = f.read(block), None, False
    plain = raw[:5] == b'WARC/' or raw[:2] != b'\x1f\x8b' and not zipped
    while plain and raw:
        yield raw
        raw = f.read(block)
    while raw:
        wrong = ''
        if not member and (at := raw.find(b'\x1f\x8b\x08')): # the next member is not here
            wrong = 'damaged WARC file' * bool(raw.strip(b'\0')) # zeros may fill the end
            raw = raw[at:] if at > 0 else raw[-2:] + more if (more := f.read(block)) else b''
        else:
            if not member:
                member, n_in, n_out = zlib.decompressobj(31), 0, 0
            try:
                piece = member.decompress(raw, 1 << 20)
                rest = member.unused_data if member.eof else member.unconsumed_tail
                n_in, n_out, raw = n_in + len(raw) - len(rest), n_out + len(piece), rest or f.read(block)
                if piece:
                    lost = False
                    yield piece
                wrong = 'gzip bomb' * (n_out > LIMIT and n_out > 200 * n_in)
            except zlib.error:
                raw, wrong = raw[n_in == 0:], 'damaged WARC file' # from the second byte of a member that is none
            member = None if wrong or member.eof else member
        if wrong and not lost:
            lost = True
            skipped[wrong] += 1
            yield b''
    while member and (piece := member.decompress(b'', 1 << 20)):
        yield piece
    if member and not member.eof: # cut short
        skipped['damaged WARC file'] += 1
        yield b''

def warc_records(pieces, skipped):
    """Yield (fields, content) of each whole record. A record starts where a line starts with WARC/1."""
    buf, ended = bytearray(), ''
    def fill(size):
        """Are there as many bytes, before the end of the file or of this undamaged part of it?"""
        nonlocal ended
        while len(buf) < size and not ended:
            piece = next(pieces, None)
            ended = '' if piece else 'file' if piece is None else 'part'
            buf.extend(piece or b'')
        return len(buf) >= size
    while True:
        del buf[:re.match(rb'[\r\n \0]*', buf).end()]
        if not fill(7):
            if ended == 'file':
                return
            buf.clear()
            ended = ''
            continue
        if not buf.startswith(b'WARC/1'): # junk, to the next line that starts so
            at = buf.find(b'\nWARC/1')
            del buf[:at + 1 if at >= 0 else len(buf) - 6]
            continue
        while not (head := re.search(rb'\r?\n\r?\n', buf)) and len(buf) < 1 << 16 and fill(len(buf) + 1):
            pass
        lines = buf[:head.start()].decode('utf-8', 'replace').split('\n') if head else []
        fields = {key.strip().lower(): value.strip() for key, _, value in (line.partition(':') for line in lines)}
        if not re.fullmatch(r'\d{1,18}', fields.get('content-length', '')):
            if head:
                skipped['WARC record with a broken header'] += 1
            del buf[:6]
            continue
        start, size = head.end(), int(fields['content-length'])
        if size > LIMIT:
            skipped['page over 50 MB'] += 1
            size += start
            while size and fill(1):
                dropped = min(size, len(buf))
                del buf[:dropped]
                size -= dropped
            continue
        end = start + size
        fill(end + 9) # to see what follows: empty lines and a record, or else the length is wrong
        after = bytes(buf[end:end + 9]).lstrip(b'\r\n')
        if len(buf) >= end and after[:5] == b'WARC/'[:len(after)]:
            yield fields, bytes(buf[start:end])
            del buf[:end]
            continue
        at = buf.find(b'\r\n\r\nWARC/1', start - 4, end + 10) # the next record is inside this one?
        if at >= 0 or len(buf) >= end:
            skipped['WARC record with a wrong length'] += 1
        elif ended == 'file':
            skipped['WARC record cut short'] += 1
        del buf[:at + 4 if at >= 0 else end]

def undo_codings(body, headers):
    """What HTTP did to a body on its way, where a crawler has kept that -> the body, or None if it cannot be undone."""
    done = re.match(rb'\s*<', body) # Common Crawl has undone them, others have and still keep the header
    if 'chunked' in headers.get('transfer-encoding', '').lower() and not done:
        chunks, at, size = [], 0, re.compile(rb'\r?\n?([0-9a-fA-F]{1,8})[^\r\n]*\r\n')
        while (chunk := size.match(body, at)) and int(chunk[1], 16):
            at = chunk.end() + int(chunk[1], 16)
            chunks.append(body[chunk.end():at])
        body = b''.join(chunks) or body
    coding = headers.get('content-encoding', '').lower()
    if coding in ('gzip', 'x-gzip', 'deflate') and not done:
        for bits in (47, -15): # gzip or zlib, by its header; deflate often comes without one
            with contextlib.suppress(zlib.error):
                return zlib.decompressobj(bits).decompress(body, LIMIT + 1)
    return None if coding not in ('', 'identity') and not done else body

def warc_pages(f, zipped, skipped):
    """Yield (url, content type, page) of each page in a WARC file, (url, '', text) in a WET file."""
    for fields, content in warc_records(unzipped(f, zipped, skipped), skipped):
        kind, url = fields.get('warc-type'), fields.get('warc-target-uri', '').strip('<>')
        status, headers, body = '200', fields, content
        if kind == 'conversion':
            yield url, '', content.decode('utf-8', 'replace')
        elif kind == 'response':
            head, body = (re.split(rb'\r?\n\r?\n', content, maxsplit=1) + [b''])[:2]
            status, *lines = head.decode('latin-1').split('\n')
            headers = {key.strip().lower(): value.strip() for key, _, value in (line.partition(':') for line in lines)}
        if kind in ('response', 'resource'): # a resource comes without HTTP
            media = headers.get('content-type', 'text/html').lower()
            if not re.search(r'(^|\s)200', status) or not re.match('text/html|application/xhtml', media):
                skipped['not a page (status or type)'] += 1
            elif (page := undo_codings(body, headers)) is None:
                skipped['page in an unknown coding'] += 1
            elif not page or len(page) > LIMIT:
                skipped['page over 50 MB' if page else 'empty page'] += 1
            else:
                yield url, media, page
