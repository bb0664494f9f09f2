"""The page's style sheet: light or dark as the reader has it, on a phone as on a desk and on paper."""

from .colours import DARK, GREY, LIGHT

_DASHES = ("none", "7 3", "2 3", "9 3 2 3")


def style() -> str:
    pick = lambda i, colours: "".join(f"--c{n}:{colour};" for n, colour in enumerate(colours)) + f"--grey:{GREY[i]};"
    looks = "".join(f".c{n}{{--mine:var(--c{n})}}" for n in range(len(LIGHT))) + ".grey{--mine:var(--grey)}"
    looks += "".join(f".d{n}{{--dash:{dash}}}" for n, dash in enumerate(_DASHES))
    light = "--page:#ffffff;--card:#f6f7f9;--ink:#1b2027;--soft:#5b6470;--rule:#dfe3e8;--grid:#e6e9ed;--idle:#eceff2;--band:#8a93a0;" + pick(0, LIGHT)
    dark = "--page:#15181d;--card:#1d2127;--ink:#e8ebef;--soft:#a0a8b4;--rule:#333a43;--grid:#2c323a;--idle:#272c34;--band:#8a93a0;" + pick(1, DARK)
    return (f":root{{color-scheme:light dark;{light}}}"
            f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}" + looks + _RULES)


_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:21px;line-height:1.25;margin:0 0 10px;overflow-wrap:anywhere}
h2 small{font-weight:400;font-size:15px;color:var(--soft);margin-left:.4em}
h3{font-size:16px;margin:28px 0 10px}
h4{font-size:15px;margin:0}
section{margin-top:34px;padding-top:26px;border-top:1px solid var(--rule)}
.about{color:var(--soft);margin:0}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;margin:14px 0 0;padding:0}
a{color:inherit}
code,.name,th[scope=row],pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.command{margin:0 0 12px;background:var(--card);border:1px solid var(--rule);border-radius:6px;padding:8px 12px;overflow-wrap:anywhere;font-size:13px}
dl{display:flex;flex-wrap:wrap;gap:6px 22px;margin:0 0 18px;font-size:13px}
dl div{display:flex;gap:6px;min-width:0}
dt{color:var(--soft);white-space:nowrap}
dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.verdict{font-size:17px;margin:0 0 18px;max-width:52em;overflow-wrap:anywhere}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:6px 20px;margin:0 0 14px;padding:0;font-size:13px}
.legend li{display:flex;align-items:center;gap:7px;min-width:0}
.legend code{overflow-wrap:anywhere}
.legend svg{flex:none}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:26px 36px;margin:0 0 26px;align-items:start}
figure{margin:0;min-width:0}
figure>svg{display:block;width:100%;height:auto}
figcaption{margin-bottom:6px}
figcaption p{margin:1px 0 0;min-height:1.5em;font-size:12.5px;color:var(--soft);display:flex;flex-wrap:wrap;gap:0 14px}
.mark{display:inline-flex;align-items:center;gap:6px}
.mark svg{flex:none}
text{fill:var(--ink)}
.tick,.label{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}
.name,.value{paint-order:stroke;stroke:var(--page);stroke-width:3px;stroke-linejoin:round}
.name{font-size:11px}
.value{font-size:11px;font-variant-numeric:tabular-nums}
.grid{stroke:var(--grid);stroke-width:1}
.zero{stroke:var(--soft);stroke-width:1}
.line{fill:none;stroke:var(--mine);stroke-width:2;stroke-dasharray:var(--dash);stroke-linejoin:round}
.marker{fill:var(--mine);stroke:transparent;stroke-width:10;pointer-events:all}
.dashed{fill:none;stroke:var(--mine,var(--soft));stroke-width:1.2;stroke-dasharray:2 3}
.middle{stroke:var(--soft);stroke-width:1.5}
.seeds{fill:var(--mine,var(--band));fill-opacity:.16}
.span{stroke:var(--mine);stroke-width:5;stroke-opacity:.3;stroke-linecap:round}
.band{fill:var(--band);fill-opacity:.2}
.level{stroke:var(--soft);stroke-width:1.3;stroke-dasharray:4 3}
.ring{fill:none;stroke:var(--ink);stroke-width:1.5}
.bar{fill:var(--mine)}
.floor{stroke:var(--ink);stroke-width:2}
.predicted{fill:var(--page);stroke:var(--ink);stroke-width:1.5}
.whisker{fill:none;stroke:var(--ink);stroke-width:1.2}
.idle{fill:var(--idle)}
.computing{fill:var(--grey)}
.communicating{fill:var(--mine);fill-opacity:.85}
.table{overflow-x:auto;margin:0 0 20px;border:1px solid var(--rule);border-radius:6px}
table{border-collapse:collapse;font-size:13px;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 9px;text-align:left;white-space:nowrap;border-top:1px solid var(--rule)}
thead th{border-top:0;color:var(--soft);font-weight:600;background:var(--card)}
th.number,td.number{text-align:right}
th[scope=row]{font-weight:400;font-size:12px;white-space:normal}
details{color:var(--soft);font-size:13px}
summary{cursor:pointer}
pre{white-space:pre-wrap;font-size:12px;line-height:1.45;overflow-wrap:anywhere}
@media (max-width:520px){main{padding:18px 14px 40px}h1{font-size:22px}.verdict{font-size:15.5px}.tick,.label,.name,.value{font-size:12px}}
@media print{section{break-before:page}figure,tr{break-inside:avoid}}
"""
