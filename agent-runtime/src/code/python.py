"""Ratoon's Python: a zygote that forks contexts; see code/mod.rs for what is said on descriptor 3."""
import ast, base64, builtins, faulthandler, gc, io, json, linecache, os, signal, sys, threading
import traceback, types, warnings

CTL = 3
LINE_MAX = 8 << 20  # a value to be shown, bytes of JSON
TEXT_MAX = 1 << 20  # of it as plain text, characters
ANSWER_MAX = 32 << 10  # of unflushed output that travels with the answer, bytes
SPAWNS = frozenset(
    ("subprocess.Popen", "os.system", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn")
)
FORMS = (
    ("text/html", "_repr_html_"),
    ("text/markdown", "_repr_markdown_"),
    ("text/latex", "_repr_latex_"),
    ("application/json", "_repr_json_"),
    ("image/svg+xml", "_repr_svg_"),
    ("image/png", "_repr_png_"),
    ("image/jpeg", "_repr_jpeg_"),
)
FLAGS = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT


class State:
    """What signal handlers and threads look at."""

    running = False  # a cell runs: SIGINT may raise
    hold = 0  # not now: a message is half sent
    held = False  # SIGINT came meanwhile
    alive = True  # this is the context itself, not a child that it forked
    lined = False  # outputs are line-buffered for the rest of the cell
    loop = None
    lock = threading.Lock()


class Raw(io.FileIO):
    """Descriptor 1 or 2. It has room for a `write` of its own, see `leftover`. (A method in Python would
    be a place where an interrupt makes the buffer above believe that nothing was written.)"""


def leftover(stream, raw):
    """What the stream still holds, without writing it."""
    parts = []

    def write(data):
        parts.append(bytes(data))
        return len(data)

    raw.write = write
    try:
        stream.flush()
    except (RuntimeError, OSError, ValueError):
        pass
    del raw.write
    return b"".join(parts)


def on_interrupt(signum, frame):
    if State.hold:
        State.held = True
    elif State.running:
        raise KeyboardInterrupt


def on_tick(signum, frame):
    """The cell runs for a while: from now on its output is seen line by line."""
    if State.running and State.alive:
        State.lined = True
        for stream in (OUT, ERR):
            try:
                stream.reconfigure(line_buffering=True)
            except (RuntimeError, OSError, ValueError):
                pass  # it is being written to, or the cell has closed it


def on_audit(event, args):
    if event in SPAWNS and State.alive:
        flush()


def flush():
    for stream in (OUT, ERR):
        try:
            stream.flush()
        except (RuntimeError, OSError, ValueError):
            pass


def send(data):
    """All of it, whole; an interrupt waits until it is out."""
    if not State.alive:
        return
    State.hold += 1
    try:
        with State.lock:
            view = memoryview(data)
            while view:
                view = view[os.write(CTL, view) :]
    finally:
        State.hold -= 1
    if State.held and not State.hold:
        State.held = False
        if State.running and threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt


def line(kind, value):
    return kind + json.dumps(value, default=str).encode() + b"\n"


def is_figure(value):
    figure = sys.modules.get("matplotlib.figure")
    return figure is not None and isinstance(value, figure.Figure)


def picture(figure):
    data = io.BytesIO()
    figure.savefig(data, format="png", bbox_inches="tight")
    return data.getvalue()


def encode(mime, form):
    if isinstance(form, tuple) and form:
        form = form[0]  # (data, metadata)
    if isinstance(form, (bytes, bytearray, memoryview)):
        if mime.startswith("image/") and mime != "image/svg+xml":
            return base64.b64encode(form).decode()
        return bytes(form).decode("utf-8", "replace")
    if isinstance(form, str) or form is None or mime == "application/json" or mime.endswith("+json"):
        return form
    return str(form)


def forms(value):
    """All forms of a value, by MIME type."""
    kind = type(value)
    data = {}
    if not isinstance(value, type):
        if getattr(kind, "_repr_mimebundle_", None) is not None:
            try:
                bundle = value._repr_mimebundle_(include=None, exclude=None)
                if isinstance(bundle, tuple):
                    bundle = bundle[0]
                for mime, form in dict(bundle or {}).items():
                    data[str(mime)] = encode(str(mime), form)
            except Exception:
                traceback.print_exc()
        for mime, method in FORMS:
            if mime not in data and getattr(kind, method, None) is not None:
                try:
                    form = encode(mime, getattr(value, method)())
                except NotImplementedError:
                    continue
                except Exception:
                    traceback.print_exc()
                    continue
                if form is not None:
                    data[mime] = form
        if "image/png" not in data and is_figure(value):
            data["image/png"] = encode("image/png", picture(value))
    if "text/plain" not in data:
        text = repr(value)
        data["text/plain"] = text if len(text) <= TEXT_MAX else text[:TEXT_MAX] + "…"
    return data


def shown(data, result):
    """The line that shows a value."""
    message = {"result": True, "data": data} if result else {"data": data}
    whole = line(b"D", message)
    while len(whole) > LINE_MAX and len(data) > 1:
        mime = max((mime for mime in data if mime != "text/plain"), key=lambda mime: len(str(data[mime])))
        print("ratoon: a value's form %s is too large to show" % mime, file=sys.stderr)
        del data[mime]
        whole = line(b"D", message)
    return whole


def display(*values, **unused):
    """Shows values in all their forms."""
    for value in values:
        if is_figure(value):
            State.shown.add(id(value))
        send(shown(forms(value), False))


def show_figures(value):
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None or not hasattr(pyplot, "get_fignums"):
        return
    try:
        for number in pyplot.get_fignums():
            figure = pyplot.figure(number)
            if figure is not value and id(figure) not in State.shown and figure.get_axes():
                data = {"text/plain": repr(figure), "image/png": encode("image/png", picture(figure))}
                send(shown(data, False))
    finally:
        # It forgets the figures' numbers; a figure that is the cell's value can still be drawn.
        pyplot.close("all")


def drive(coroutine):
    import asyncio

    if State.loop is None or State.loop.is_closed():
        State.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(State.loop)
    task = State.loop.create_task(coroutine)
    try:
        return State.loop.run_until_complete(task)
    except KeyboardInterrupt:
        task.cancel()
        try:
            State.loop.run_until_complete(task)
        except BaseException:
            pass
        raise


def call(code, names):
    if code.co_flags & 0x80:  # inspect.CO_COROUTINE
        return drive(eval(code, names))
    return eval(code, names)


def execute(text, name, names):
    """Runs a cell; returns the value of its last expression."""
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    tree = compile(text, name, "exec", ast.PyCF_ONLY_AST | FLAGS)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    if tree.body:
        call(compile(tree, name, "exec", FLAGS), names)
    if last is None:
        return None
    value = call(compile(ast.Expression(last.value), name, "eval", FLAGS), names)
    return None if text.rstrip().endswith(";") else value


def explain(error):
    """An exception, without the frames of this file."""
    trace = error.__traceback__
    while trace is not None and not trace.tb_frame.f_code.co_filename.startswith("<cell "):
        trace = trace.tb_next
    kind = type(error)
    try:
        text = "".join(traceback.format_exception(kind, error, trace))
    except Exception as failure:
        text = "%s (and its traceback cannot be made: %r)\n" % (kind.__name__, failure)
    try:
        message = str(error)
    except Exception:
        message = "(its str() fails)"
    data = text.encode("utf-8", "replace")
    if len(data) > 32 << 10:
        data = data[-(32 << 10) + 64 :]
        data = "…\n".encode() + data[data.find(b"\n") + 1 :]
    message = message.encode("utf-8", "replace")[: 8 << 10]
    return {
        "name": kind.__name__[:256],
        "message": message.decode("utf-8", "replace"),
        "traceback": data.decode("utf-8", "replace"),
    }


def run(text, number, names):
    answer = {"status": "ok"}
    parts = []  # of the answer: all in one system call
    State.shown = set()
    State.held = False
    try:
        try:
            State.running = True
            value = execute(text, "<cell %d>" % number, names)
            show_figures(value)
            if value is not None:
                builtins._ = None
                data = forms(value)
                builtins._ = value
                parts.append(shown(data, True))
        finally:
            State.running = False
    except SystemExit:
        State.running = False
        raise
    except BaseException as error:
        State.running = False
        answer = {"status": "error", "error": explain(error)}
        error.__traceback__ = None
    if not State.alive:
        flush()
        os._exit(0)
    # What the outputs still hold goes out with it.
    for stream, raw, kind in ((OUT, OUT_RAW, b"O"), (ERR, ERR_RAW, b"P")):
        rest = leftover(stream, raw)
        if len(rest) > ANSWER_MAX:
            view = memoryview(rest)
            while view:
                view = view[os.write(raw.fileno(), view) :]
        elif rest:
            parts.append(b"%s%d\n%s" % (kind, len(rest), rest))
    if State.lined:
        State.lined = False
        for stream in (OUT, ERR):
            try:
                stream.reconfigure(line_buffering=False)
            except (RuntimeError, OSError, ValueError):
                pass
    parts.append(line(b"E", answer))
    send(b"".join(parts))


def on_wake(signum, frame):
    """The machine has become another one: what makes random numbers by itself begins anew. Generators
    that the cells have made are theirs."""
    if not State.alive:
        return
    random = sys.modules.get("random")
    if random is not None:
        random.seed()
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        numpy.seed(int.from_bytes(os.urandom(4), "little"))
    openssl = sys.modules.get("_ssl")
    if openssl is not None:
        openssl.RAND_add(os.urandom(32), 32.0)


def forked():
    """In a child that a cell has forked."""
    State.alive = False
    State.lock = threading.Lock()
    try:
        os.close(CTL)
    except OSError:
        pass


def streams():
    global OUT, ERR, OUT_RAW, ERR_RAW
    made = []
    for descriptor in (1, 2):
        raw = Raw(descriptor, "w", closefd=False)
        buffered = io.BufferedWriter(raw, 32 << 10)
        errors = "surrogateescape" if descriptor == 1 else "backslashreplace"
        text = io.TextIOWrapper(buffered, "utf-8", errors, "\n", False, False)
        text.mode = "w"
        made.append((text, raw))
    (OUT, OUT_RAW), (ERR, ERR_RAW) = made
    sys.stdout = sys.__stdout__ = OUT
    sys.stderr = sys.__stderr__ = ERR


def context(request, descriptors):
    """The life of a context. Returns when it ends."""
    os.setsid()
    control, out, err = descriptors
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.dup2(control, CTL, inheritable=False)
    for descriptor in descriptors:
        os.close(descriptor)
    os.environ.update(request.get("env", {}))
    os.environ.setdefault("MPLBACKEND", "Agg")
    if "cwd" in request:
        try:
            os.chdir(request["cwd"])
        except OSError as error:
            send(line(b"X", {"errno": error.errno}))
            return
    streams()
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    builtins.display = display
    os.register_at_fork(after_in_child=forked)
    sys.addaudithook(on_audit)
    gc.enable()
    send(b"H\n")
    number = 0
    rest = b""
    while True:
        while b"\n" not in rest:
            more = os.read(CTL, 1 << 16)
            if not more:
                return
            rest += more
        text, _, rest = rest.partition(b"\n")
        request = json.loads(text)
        if "run" in request:
            number += 1
            run(request["run"], number, main.__dict__)


def zygote():
    """Forks a context for each request, until the runtime is gone."""
    import array, socket

    control = socket.socket(fileno=os.dup(CTL))
    room = socket.CMSG_SPACE(3 * 4)
    rest = b""
    while True:
        data, extra, _, _ = control.recvmsg(1 << 16, room)
        if not data:
            os._exit(0)
        descriptors = array.array("i")
        for level, kind, payload in extra:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(payload[: len(payload) - len(payload) % 4])
        rest += data
        while b"\n" in rest:
            text, _, rest = rest.partition(b"\n")
            request = json.loads(text)
            if "reap" in request:
                status = 0
                try:
                    status = os.waitpid(request["reap"], 0)[1]
                except OSError:
                    pass
                control.sendall(line(b"R", {"pid": request["reap"], "status": status}))
            elif len(descriptors) == 3:
                if os.fork() == 0:
                    control.close()
                    return request, list(descriptors)
                for descriptor in descriptors:
                    os.close(descriptor)
                descriptors = array.array("i")


def begin():
    os.set_inheritable(CTL, False)
    signal.signal(signal.SIGINT, on_interrupt)
    signal.signal(signal.SIGURG, on_tick)
    signal.siginterrupt(signal.SIGURG, False)
    signal.signal(signal.SIGWINCH, on_wake)
    signal.siginterrupt(signal.SIGWINCH, False)
    warnings.filterwarnings("ignore", "(FigureCanvasAgg is non-interactive|Matplotlib is currently using agg)")
    faulthandler.enable(2)
    # Nothing that is here now is garbage; untouched, it stays shared with the contexts.
    gc.disable()
    gc.freeze()
    context(*zygote())


begin()
