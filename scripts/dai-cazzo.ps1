<#
.SYNOPSIS
End-to-end check of a running ai-server: diag, pull, job, models, chat, stream, errors.

.DESCRIPTION
Works in Windows PowerShell 5.1 and PowerShell 7. Start the server in one terminal and this script in a second one.
Exits 1 when a step failed. scripts/smoke.sh takes the same steps with curl.

.EXAMPLE
./scripts/dai-cazzo.ps1 -BaseUrl http://127.0.0.1:8005 -Model smollm2:135m
#>
[CmdletBinding()]
param(
    [string]$BaseUrl = 'http://127.0.0.1:8005',
    [string]$Model = 'smollm2:135m',
    [string]$Prompt = 'What is the capital of France?',
    [int]$TimeoutSeconds = 600
)

Set-StrictMode -Version 2.0
$ErrorActionPreference = 'Stop'
Add-Type -AssemblyName System.Net.Http

# This file is plain ASCII, because Windows PowerShell reads scripts without a byte order mark as ANSI.
try { [Console]::OutputEncoding = [System.Text.Encoding]::UTF8 } catch { Write-Verbose 'The console keeps its encoding.' }
$CheckMark = [string][char]0x2713
$CrossMark = [string][char]0x2717

$BaseUrl = $BaseUrl.TrimEnd('/')
$Failed = New-Object System.Collections.ArrayList
$Handler = New-Object System.Net.Http.HttpClientHandler
$Handler.UseProxy = $false
$Client = New-Object System.Net.Http.HttpClient -ArgumentList $Handler
$Client.Timeout = [TimeSpan]::FromSeconds($TimeoutSeconds)

# Sends one request and returns the response as soon as its headers are there.
function Send-Request {
    param([string]$Method, [string]$Path, [string]$Body = '')
    $verb = New-Object System.Net.Http.HttpMethod -ArgumentList $Method
    $request = New-Object System.Net.Http.HttpRequestMessage -ArgumentList $verb, ($BaseUrl + $Path)
    if ($Body -ne '') {
        $request.Content = New-Object System.Net.Http.StringContent -ArgumentList $Body, ([System.Text.Encoding]::UTF8), 'application/json'
    }
    $whenHeadersAreRead = [System.Net.Http.HttpCompletionOption]::ResponseHeadersRead
    return $Client.SendAsync($request, $whenHeadersAreRead).GetAwaiter().GetResult()
}

# Sends one request and returns its status, text, JSON and backend.
function Invoke-Api {
    param([string]$Method, [string]$Path, [string]$Body = '')
    $response = Send-Request -Method $Method -Path $Path -Body $Body
    try {
        $text = $response.Content.ReadAsStringAsync().GetAwaiter().GetResult()
        $json = $null
        try { $json = $text | ConvertFrom-Json } catch { Write-Verbose 'The reply is not JSON.' }
        $backend = ''
        if ($response.Headers.Contains('X-Backend')) {
            $backend = @($response.Headers.GetValues('X-Backend')) -join ','
        }
        return [pscustomobject]@{ Status = [int]$response.StatusCode; Text = $text; Json = $json; Backend = $backend }
    }
    finally {
        $response.Dispose()
    }
}

function New-ChatBody {
    param([bool]$Stream)
    $message = @{ role = 'user'; content = $Prompt }
    return @{ model = $Model; messages = @($message); stream = $Stream; max_tokens = 48; temperature = 0 } | ConvertTo-Json -Depth 6 -Compress
}

# Stops the current step with a reason unless the condition holds.
function Assert-That {
    param([bool]$Condition, [string]$Reason)
    if (-not $Condition) { throw $Reason }
}

function Assert-Status {
    param([object]$Reply, [int[]]$Expected)
    Assert-That -Condition ($Expected -contains $Reply.Status) -Reason ('status {0} instead of {1}: {2}' -f $Reply.Status, ($Expected -join ' or '), $Reply.Text)
}

# Runs one step, prints how it ended and remembers a failure; the steps after it still run.
function Invoke-Step {
    param([string]$Name, [scriptblock]$Action)
    try {
        $detail = & $Action
        Write-Host ('{0} {1}: {2}' -f $CheckMark, $Name, $detail) -ForegroundColor Green
    }
    catch {
        Write-Host ('{0} {1}: {2}' -f $CrossMark, $Name, $_.Exception.Message) -ForegroundColor Red
        [void]$Failed.Add($Name)
    }
}

function Test-Diag {
    $reply = Invoke-Api -Method 'GET' -Path '/diag'
    Assert-Status -Reply $reply -Expected 200
    Assert-That -Condition ($reply.Json.cuda.available -is [bool]) -Reason 'cuda.available is not true or false'
    return 'ai-server {0}, Python {1}, CUDA {2}' -f $reply.Json.version, $reply.Json.python, $reply.Json.cuda.available
}

function Start-Pull {
    $body = @{ model = $Model } | ConvertTo-Json -Compress
    $reply = Invoke-Api -Method 'POST' -Path '/pull' -Body $body
    Assert-Status -Reply $reply -Expected 200, 202
    $script:JobId = [string]$reply.Json.id
    Assert-That -Condition ($script:JobId -ne '') -Reason 'the reply has no job id'
    return 'job {0}' -f $script:JobId
}

function Wait-Job {
    Assert-That -Condition ($script:JobId -ne '') -Reason 'there is no job'
    $clock = [System.Diagnostics.Stopwatch]::StartNew()
    while ($clock.Elapsed.TotalSeconds -lt $TimeoutSeconds) {
        $reply = Invoke-Api -Method 'GET' -Path ('/jobs/' + $script:JobId)
        Assert-Status -Reply $reply -Expected 200
        if ($reply.Json.status -eq 'succeeded') { return 'succeeded' }
        Assert-That -Condition (@('queued', 'running') -contains $reply.Json.status) -Reason ('the job {0}: {1}' -f $reply.Json.status, $reply.Json.error)
        Start-Sleep -Milliseconds 500
    }
    throw ('not finished after {0} s' -f $TimeoutSeconds)
}

function Test-ModelList {
    $reply = Invoke-Api -Method 'GET' -Path '/models'
    Assert-Status -Reply $reply -Expected 200
    $names = @($reply.Json.models | ForEach-Object { $_.name })
    Assert-That -Condition ($names -contains $Model) -Reason ('{0} is not among: {1}' -f $Model, ($names -join ', '))
    return $names -join ', '
}

function Test-Chat {
    $reply = Invoke-Api -Method 'POST' -Path '/chat' -Body (New-ChatBody -Stream $false)
    Assert-Status -Reply $reply -Expected 200
    Assert-That -Condition ($reply.Json.done -eq $true) -Reason 'the reply is not done'
    Assert-That -Condition ([string]$reply.Json.message.content -ne '') -Reason 'the answer is empty'
    Assert-That -Condition ($reply.Json.eval_count -gt 0) -Reason 'eval_count is not positive'
    Assert-That -Condition ($reply.Backend -ne '') -Reason 'the header X-Backend is missing'
    return '{0} ({1} tokens, backend {2})' -f $reply.Json.message.content.Trim(), $reply.Json.eval_count, $reply.Backend
}

# Reads an NDJSON reply line by line, as it arrives.
function Read-Lines {
    param([object]$Response)
    $stream = $Response.Content.ReadAsStreamAsync().GetAwaiter().GetResult()
    $reader = New-Object System.IO.StreamReader -ArgumentList $stream, ([System.Text.Encoding]::UTF8)
    while ($null -ne ($line = $reader.ReadLine())) {
        if ($line.Trim() -ne '') { $line | ConvertFrom-Json }
    }
}

function Test-Stream {
    $response = Send-Request -Method 'POST' -Path '/chat' -Body (New-ChatBody -Stream $true)
    try {
        Assert-That -Condition ([int]$response.StatusCode -eq 200) -Reason ('status {0} instead of 200' -f [int]$response.StatusCode)
        $lines = @(Read-Lines -Response $response)
    }
    finally {
        $response.Dispose()
    }
    $errors = @($lines | Where-Object { $_.PSObject.Properties.Name -contains 'error' })
    Assert-That -Condition ($errors.Count -eq 0) -Reason 'the stream has an error line'
    Assert-That -Condition ($lines.Count -gt 1) -Reason 'the stream has no chunks'
    $ends = @($lines | Where-Object { $_.done -eq $true })
    Assert-That -Condition ($ends.Count -eq 1 -and $lines[-1].done -eq $true) -Reason 'there is not exactly one last line'
    $text = -join ($lines | Where-Object { $_.PSObject.Properties.Name -contains 'message' } | ForEach-Object { $_.message.content })
    Assert-That -Condition ($text -ne '') -Reason 'the chunks have no text'
    return '{0} ({1} lines)' -f $text.Trim(), $lines.Count
}

function Test-Errors {
    $missing = Invoke-Api -Method 'POST' -Path '/chat' -Body (@{ messages = @() } | ConvertTo-Json -Compress)
    Assert-Status -Reply $missing -Expected 400
    Assert-That -Condition ($missing.Json.error -like "*Missing 'model' in payload*") -Reason ('wrong message: {0}' -f $missing.Text)
    $unknown = Invoke-Api -Method 'POST' -Path '/chat' -Body (@{ model = 'never-pulled/model'; prompt = 'Hello' } | ConvertTo-Json -Compress)
    Assert-Status -Reply $unknown -Expected 404
    Assert-That -Condition ($unknown.Json.error -like '*/pull*') -Reason ('the message does not name /pull: {0}' -f $unknown.Text)
    $broken = Invoke-Api -Method 'POST' -Path '/chat' -Body '{"model": '
    Assert-Status -Reply $broken -Expected 400
    return '400 without a model, 404 for an unknown one, 400 for broken JSON'
}

$script:JobId = ''
Write-Host ('Checking {0} with {1}' -f $BaseUrl, $Model)
try {
    Invoke-Step -Name 'diag' -Action { Test-Diag }
    Invoke-Step -Name 'pull' -Action { Start-Pull }
    Invoke-Step -Name 'job' -Action { Wait-Job }
    Invoke-Step -Name 'models' -Action { Test-ModelList }
    Invoke-Step -Name 'chat' -Action { Test-Chat }
    Invoke-Step -Name 'stream' -Action { Test-Stream }
    Invoke-Step -Name 'errors' -Action { Test-Errors }
}
finally {
    $Client.Dispose()
}

if ($Failed.Count -gt 0) {
    Write-Host ('Failed: {0}' -f ($Failed -join ', ')) -ForegroundColor Red
    exit 1
}
Write-Host 'All steps passed.' -ForegroundColor Green
exit 0
